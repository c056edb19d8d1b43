"""Draws to the arrays that the graph takes: the one place where our units become DALI's.

The graph declares its inputs by calling `arrays` on one blank sample, so what it asks for is what it is fed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.draw import ViewDraws
from pipelines.views import ViewSpec

Arrays = dict[str, npt.NDArray[Any]]


def arrays(spec: ViewSpec, draws: ViewDraws) -> Arrays:
    """One array (B, ...) per input of a view; only those that the spec can use."""
    inputs = _center_window(spec, draws) if spec.crop == "center" else _crop_window(spec, draws)
    return {name: np.ascontiguousarray(values) for name, values in inputs.items()}


def blank_draws() -> ViewDraws:
    """One sample of 1 x 1 px to which nothing is done."""
    strong_draws = np.full((1, 16), -1, dtype=np.int8)  # as many as an AugmentSpec may ask for
    flag, number = np.zeros(1, dtype=np.bool_), np.zeros(1, dtype=np.float32)
    return ViewDraws(
        crop=np.array([[0, 0, 1, 1]], dtype=np.int32),
        turn_deg=number,
        flip=flag,
        jitter=flag,
        order=np.arange(4, dtype=np.int8)[None],
        brightness=number,
        contrast=number,
        saturation=number,
        hue=number,
        grayscale=flag,
        sigma=number,
        solarize=flag,
        strong_operation=strong_draws,
        strong_level=np.ones_like(strong_draws),
        strong_sign=np.ones_like(strong_draws),
    )


def _crop_window(spec: ViewSpec, draws: ViewDraws) -> Arrays:
    top_left, shape = draws.crop[:, None, :2], draws.crop[:, None, 2:]
    inputs: Arrays = {"crop_start": top_left, "crop_shapes": shape, "crop_shape": draws.crop[:, 2:]}
    if spec.augment.flip_p > 0:
        size = draws.crop[:, 2:].astype(np.float32)
        inputs |= _window(np.zeros_like(size), size, draws.flip)
    return inputs


def _center_window(spec: ViewSpec, draws: ViewDraws) -> Arrays:
    """The part of the image, in fractions of px, that torchvision's Resize and then CenterCrop map to the view."""
    size = draws.crop[:, 2:].astype(np.int64)
    resized = spec.resize * size // size.min(axis=1, keepdims=True)
    start = np.rint((resized - spec.size) / 2)  # half to even, as Python's round()
    px = size / resized
    return _window(start * px, (start + spec.size) * px, draws.flip)


def _window(start: npt.NDArray[Any], end: npt.NDArray[Any], flip: npt.NDArray[np.bool_]) -> Arrays:
    """(B, 2) corners as y, x. `fn.resize` mirrors a window whose end lies before its start."""
    mirrored = np.stack([np.zeros_like(flip), flip], axis=1)
    return {
        "window_start": np.where(mirrored, end, start).astype(np.float32),
        "window_end": np.where(mirrored, start, end).astype(np.float32),
    }
