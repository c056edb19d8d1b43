"""Pictures of stamps: three of their bands as colours, bright cores and faint arms together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from pipelines.views import ViewSpec

Pixels = npt.NDArray[np.float32]


def light(view: Tensor, spec: ViewSpec) -> Tensor:
    """Normalised views (B, C, S, S) of `spec` in the data's own units: the normalisation and the stretch undone."""
    if spec.shows == "positive":
        return view.float()
    shape = (1, -1, 1, 1)
    values = view.float() * torch.tensor(spec.augment.std).view(shape) + torch.tensor(spec.augment.mean).view(shape)
    return 10**values if spec.augment.stretch == "log10" else values


def scale_of(pixels: Pixels) -> float:
    """What counts as bright in (C, H, W) pixels: their 99.5 % quantile, or next to nothing if that is not positive."""
    return max(float(np.quantile(pixels, 0.995)), 1e-6)


def colours(pixels: Pixels) -> Pixels:
    """(C, H, W) -> (3, H, W): RGB as it is; of more bands, which go from blue to red, the third, second and first."""
    if len(pixels) > 3:
        return pixels[[2, 1, 0]]
    return pixels if len(pixels) == 3 else pixels[:1].repeat(3, axis=0)


def picture(pixels: Pixels, scale: float) -> Image.Image:
    """(C, H, W) on an asinh scale (Lupton et al., astro-ph/0312483), as an image."""
    return to_image(np.arcsinh(10 * colours(pixels) / scale) / np.arcsinh(np.float32(10)))


def to_image(values: Pixels) -> Image.Image:
    """(3, H, W) in [0, 1], clipped."""
    return Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))
