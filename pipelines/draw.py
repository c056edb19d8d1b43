"""Every random number of a view, as a pure function of (seed, epoch, sample, view).

Each number has its own word of the generator, addressed by the counter (block, view, sample id, epoch) under the key
`seed`. So it depends on nothing else: not on the other samples of the batch, the rank, or what was drawn before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import numpy.typing as npt

from pipelines import strong
from pipelines.philox import philox, unit
from pipelines.views import ViewSpec

# Blocks of four words. A block keeps its meaning for ever, or the views of every earlier run change.
_TRY_BLOCKS = range(5)  # area and aspect of tries 0 and 1, of tries 2 and 3, ...
_PLACE_BLOCK = 5  # top, left, flip, -
_JITTER_BLOCK = 6  # jitter, order, brightness, contrast
_COLOUR_BLOCK = 7  # saturation, hue, grayscale, blur
_LAST_BLOCK = 8  # sigma, solarize, turn, -
_STRONG_BLOCK = 16  # operation, level, sign, application of the first strong draw; 17 of the second, ...

_TRIES = 10  # torchvision's RandomResizedCrop
_ORDERS = np.array(list(permutations(range(4))), dtype=np.int8)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ViewDraws:
    """What is to be done to B samples for one view: numbers, not pixels. Arrays of length B in sample order.

    crop        int32 (B, 4): top, left, height, width in px of the decoded image; for a "center" view, the window that
                maps to the whole output after the resize is not a rectangle of whole pixels, so crop is the whole
                image (0, 0, H, W) and backends do resize-then-crop by the spec. For a "turned" view it is the window
                of the turned image
    turn_deg    float32: counter-clockwise, for "turned" views; else 0
    flip        bool: mirror horizontally
    jitter      bool: whether the four colour operations run
    order       int8 (B, 4): a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue
    brightness, contrast, saturation    float32 factors
    hue         float32: fraction of the colour circle in [-0.5, 0.5]
    grayscale   bool
    sigma       float32: blur in px of the view; 0 is no blur
    solarize    bool
    strong_operation    int8 (B, n): places in `strong.POOL` of the n strong draws, in order; -1: nothing is done
    strong_level        int8 (B, n): 1..9
    strong_sign         int8 (B, n): -1 or 1, the direction of the geometric operations

    Factors are drawn whether `jitter` holds or not. A factor of a strength 0 is exactly 1, and a hue of strength 0
    exactly 0; the backend then leaves that operation out, as torchvision does.
    """

    crop: npt.NDArray[np.int32]
    turn_deg: npt.NDArray[np.float32]
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
    strong_operation: npt.NDArray[np.int8]
    strong_level: npt.NDArray[np.int8]
    strong_sign: npt.NDArray[np.int8]


def draw_view(
    spec: ViewSpec,
    view: int,
    seed: int,
    epoch: int,
    ids: npt.ArrayLike,
    widths: npt.ArrayLike,
    heights: npt.ArrayLike,
) -> ViewDraws:
    """The draws of view number `view` (its place in `pipelines.views.flatten`) for B samples.

    ids                 sample ids (B,), each in [0, 2**32)
    widths, heights     of the decoded images in px (B,)
    """
    width, height = np.asarray(widths, dtype=np.int64), np.asarray(heights, dtype=np.int64)
    blocks = np.arange(_LAST_BLOCK + 1)[:, None]
    words = unit(philox(seed, (blocks, view, np.asarray(ids)[None, :], epoch)))  # (4 words, blocks, B)
    u_top, u_left, u_flip, _ = words[:, _PLACE_BLOCK]
    u_jitter, u_order, u_brightness, u_contrast = words[:, _JITTER_BLOCK]
    u_saturation, u_hue, u_grayscale, u_blur = words[:, _COLOUR_BLOCK]
    u_sigma, u_solarize, u_turn, _ = words[:, _LAST_BLOCK]

    if spec.crop == "center":
        crop = np.stack([np.zeros_like(height), np.zeros_like(width), height, width], axis=1)
    elif spec.crop == "turned":
        crop = _shifted_window(spec, u_top, u_left, width, height)
    else:
        tries = words[:, : len(_TRY_BLOCKS)].transpose(1, 0, 2).reshape(_TRIES, 2, -1)
        crop = _random_resized_crop(spec, tries[:, 0], tries[:, 1], u_top, u_left, width, height)
    augment = spec.augment
    sigma = _between(u_sigma, *augment.blur_sigma)
    operation, level, sign = _strong_draws(augment.strong_draws, view, seed, epoch, ids)
    return ViewDraws(
        crop=crop.astype(np.int32),
        turn_deg=(_between(u_turn, -spec.turn_deg, spec.turn_deg) * (spec.crop == "turned")).astype(np.float32),
        flip=u_flip < augment.flip_p,
        jitter=u_jitter < augment.jitter_p,
        order=_ORDERS[(u_order * len(_ORDERS)).astype(np.int64)],
        brightness=_factor(u_brightness, augment.brightness),
        contrast=_factor(u_contrast, augment.contrast),
        saturation=_factor(u_saturation, augment.saturation),
        hue=_between(u_hue, -augment.hue, augment.hue).astype(np.float32),
        grayscale=u_grayscale < augment.grayscale_p,
        sigma=np.where(u_blur < augment.blur_p, sigma, 0.0).astype(np.float32),
        solarize=u_solarize < augment.solarize_p,
        strong_operation=operation,
        strong_level=level,
        strong_sign=sign,
    )


def _strong_draws(
    num_draws: int, view: int, seed: int, epoch: int, ids: npt.ArrayLike
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.int8], npt.NDArray[np.int8]]:
    """(B, num_draws) operations, levels and signs; an operation is drawn from the pool with replacement."""
    blocks = _STRONG_BLOCK + np.arange(num_draws)[None, :]
    u_operation, u_level, u_sign, u_applied = unit(philox(seed, (blocks, view, np.asarray(ids)[:, None], epoch)))
    operation = np.where(u_applied < strong.APPLIED_P, (u_operation * len(strong.POOL)).astype(np.int64), -1)
    level = 1 + (u_level * strong.LEVELS).astype(np.int64)
    return operation.astype(np.int8), level.astype(np.int8), np.where(u_sign < 0.5, -1, 1).astype(np.int8)


def _random_resized_crop(
    spec: ViewSpec,
    u_area: Floats,
    u_aspect: Floats,
    u_top: Floats,
    u_left: Floats,
    width: npt.NDArray[np.int64],
    height: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """torchvision's RandomResizedCrop: (B, 4) top, left, height, width. u_area, u_aspect are (tries, B), the rest (B,).

    The first try that fits counts; if none does, the largest central window whose aspect is within `ratio`.
    """
    area = width * height * _between(u_area, *spec.scale)
    aspect = np.exp(_between(u_aspect, math.log(spec.ratio[0]), math.log(spec.ratio[1])))
    crop_widths, crop_heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))  # half to even
    fits = (crop_widths > 0) & (crop_widths <= width) & (crop_heights > 0) & (crop_heights <= height)
    first = fits.argmax(axis=0)
    found = fits.any(axis=0)
    each = np.arange(len(width))

    in_ratio = width / height
    widest = np.where(in_ratio > spec.ratio[1], np.rint(height * spec.ratio[1]), width)
    highest = np.where(in_ratio < spec.ratio[0], np.rint(width / spec.ratio[0]), height)
    crop_width = np.where(found, crop_widths[first, each], widest.clip(min=1)).astype(np.int64)
    crop_height = np.where(found, crop_heights[first, each], highest.clip(min=1)).astype(np.int64)

    free_height, free_width = height - crop_height, width - crop_width
    top = np.where(found, (u_top * (free_height + 1)).astype(np.int64), free_height // 2)
    left = np.where(found, (u_left * (free_width + 1)).astype(np.int64), free_width // 2)
    return np.stack([top, left, crop_height, crop_width], axis=1)


def _shifted_window(
    spec: ViewSpec, u_top: Floats, u_left: Floats, width: npt.NDArray[np.int64], height: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """(B, 4) top, left, height, width of a window of the view's size whose centre is up to shift_px off the image's."""
    places = 2 * spec.shift_px + 1
    top = (height - spec.size) // 2 + (u_top * places).astype(np.int64) - spec.shift_px
    left = (width - spec.size) // 2 + (u_left * places).astype(np.int64) - spec.shift_px
    size = np.full_like(top, spec.size)
    return np.stack([top, left, size, size], axis=1)


def _between(u: Floats, low: float, high: float) -> Floats:
    return low + u * (high - low)


def _factor(u: Floats, strength: float) -> npt.NDArray[np.float32]:
    return _between(u, max(0.0, 1.0 - strength), 1.0 + strength).astype(np.float32)
