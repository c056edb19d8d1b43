"""Every random number of a view, as a pure function of (seed, epoch, sample, view)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ViewDraws:
    """What is to be done to B samples for one view: numbers, not pixels. Arrays of length B in sample order.

    crop        int32 (B, 4): top, left, height, width in px of the decoded image; for a "center" view, the window that
                maps to the whole output after the resize is not a rectangle of whole pixels, so crop is the whole
                image (0, 0, H, W) and backends do resize-then-crop by the spec
    flip        bool: mirror horizontally
    jitter      bool: whether the four colour operations run
    order       int8 (B, 4): a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue
    brightness, contrast, saturation    float32 factors
    hue         float32: fraction of the colour circle in [-0.5, 0.5]
    grayscale   bool
    sigma       float32: blur in px of the view; 0 is no blur
    solarize    bool
    """

    crop: npt.NDArray[np.int32]
    flip: npt.NDArray[np.bool_]
    jitter: npt.NDArray[np.bool_]
    order: npt.NDArray[np.int8]
    brightness: npt.NDArray[np.float32]
    contrast: npt.NDArray[np.float32]
    saturation: npt.NDArray[np.float32]
    hue: npt.NDArray[np.float32]
    grayscale: npt.NDArray[np.bool_]
    sigma: npt.NDArray[np.float32]
    solarize: npt.NDArray[np.bool_]
