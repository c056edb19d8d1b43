"""Draws to the arrays that the graph takes: the one place where our units become DALI's.

The graph declares its inputs by calling `arrays` on one blank sample, so what it asks for is what it is fed.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines import strong
from pipelines.augment import AugmentSpec
from pipelines.draw import ViewDraws
from pipelines.views import ViewSpec

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the numbers in ViewDraws.order

# The flags of a strong draw, and the operations that each stands for. identity has none.
_STRONG_FLAGS = {
    "moves": ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"),
    "masks": ("posterize", "solarize"),
} | {name: (name,) for name in ("auto_contrast", "brightness", "contrast", "equalize", "saturation", "sharpness")}

_BOX_PASSES = 3  # Pillow's GaussianBlur is three box blurs
_PILLOW_UNIT = 2.0**-16  # px; Pillow's affine transformations count in whole numbers of it

Arrays = dict[str, npt.NDArray[Any]]


def arrays(spec: ViewSpec, draws: ViewDraws) -> Arrays:
    """One array (B, ...) per input of a view; only those that the spec can use."""
    augment = spec.augment
    inputs = _center_window(spec, draws) if spec.crop == "center" else _crop_window(spec, draws)
    if augment.grayscale_p > 0:
        inputs["grayscale"] = draws.grayscale
    if jitter_steps(augment):
        inputs |= _jitter(augment, draws)
    if augment.blur_p > 0:
        rows = _blur_kernels(draws.sigma, augment.blur_sigma[1])[:, None, :]
        inputs |= {"blur": draws.sigma > 0, "blur_rows": rows, "blur_columns": rows.swapaxes(1, 2)}
    if augment.solarize_p > 0:
        inputs["solarize"] = draws.solarize
    for draw in range(augment.strong_draws):
        inputs |= {f"strong{draw}_{name}": values for name, values in _strong_draw(spec.size, draws, draw).items()}
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


def jitter_steps(augment: AugmentSpec) -> list[int]:
    """The fixed sequence of colour operations from which each sample takes those that make up its own order.

    Every order of the operations that the jitter can do is a subsequence of it. For all four it is the cheapest such
    sequence, found by search, when the hue counts as forty nodes: once, in the middle. Four slots with a choice of four
    in each would be twice as many nodes, and DALI takes 1 to 5 us per sample and node whatever the image's size.
    """
    if augment.jitter_p == 0:
        return []
    strengths = (augment.brightness, augment.contrast, augment.saturation)
    others: list[int] = []
    for number in (BRIGHTNESS, CONTRAST, BRIGHTNESS, SATURATION, BRIGHTNESS, CONTRAST, BRIGHTNESS):
        if strengths[number] > 0 and number not in others[-1:]:
            others.append(number)
    return [*others, HUE, *others] if augment.hue > 0 else others


def _strong_draw(size: int, draws: ViewDraws, draw: int) -> Arrays:
    """Draw number `draw` of each sample."""
    operation, level, sign = draws.strong_operation[:, draw], draws.strong_level[:, draw], draws.strong_sign[:, draw]
    levels = range(1, strong.LEVELS + 1)
    factors = np.array([0.0, *map(strong.enhance_factor, levels)], dtype=np.float32)
    # The bits of a value to keep, and the largest value that is not inverted.
    posterize = [(-(2 ** (8 - strong.posterize_bits(v))) % 256, 255) for v in levels]
    solarize = [(255, strong.solarize_threshold(v) - 1) for v in levels]
    masks = np.array([posterize, solarize], dtype=np.uint8)
    # The last column is that of operation -1, which is nothing.
    stands_for = np.array([[name in names for name in (*strong.POOL, "")] for names in _STRONG_FLAGS.values()])
    return {
        **dict(zip(_STRONG_FLAGS, stands_for[:, operation])),
        "matrix": _matrices(size)[operation, level, sign],
        "mask": masks[(operation == strong.POOL.index("solarize")).astype(np.intp), level - 1],
        "factor": factors[level],
    }


@functools.lru_cache(maxsize=16)  # a matrix at a time would take longer than all other arrays
def _matrices(size: int) -> npt.NDArray[np.float32]:
    """(operation, level, sign, 2, 3): from a place (x, y, 1) in the output to the place in the input that it shows.

    In px from the corner of the image, rounded as Pillow rounds. Otherwise a shear of 0.12, where every 25th line falls
    between two pixels, would take the other one.
    """
    matrices = np.empty((len(strong.POOL), strong.LEVELS + 1, 3, 2, 3), dtype=np.float32)  # sign -1 is the last of 3
    for place, level, sign in np.ndindex(*matrices.shape[:3]):
        matrix = _matrix(strong.POOL[place], level, 1 - 2 * (sign == 2), size)
        first = _rounded(matrix @ [0.5, 0.5, 1.0])  # of the first pixel's centre
        matrix = _rounded(matrix)
        matrix[:, 2] = first - matrix[:, :2] @ [0.5, 0.5]
        matrices[place, level, sign] = matrix
    return matrices


def _matrix(name: str, level: int, sign: int, size: int) -> npt.NDArray[np.float64]:
    matrix = np.eye(2, 3)
    if name == "rotate":
        angle = math.radians(strong.rotate_deg(level, sign))
        matrix[:, :2] = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        matrix[:, 2] = size / 2 - matrix[:, :2] @ [size / 2, size / 2]
    elif name == "shear_x":
        matrix[0, 1] = strong.shear(level, sign)
    elif name == "shear_y":
        matrix[1, 0] = strong.shear(level, sign)
    elif name == "translate_x":
        matrix[0, 2] = strong.translate_px(level, sign, size)
    elif name == "translate_y":
        matrix[1, 2] = strong.translate_px(level, sign, size)
    return matrix


def _rounded(px: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.floor(px / _PILLOW_UNIT + 0.5) * _PILLOW_UNIT


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


def _jitter(augment: AugmentSpec, draws: ViewDraws) -> Arrays:
    steps = jitter_steps(augment)
    order = draws.order[np.isin(draws.order, steps)].reshape(-1, len(set(steps)))
    order = np.pad(order, [(0, 0), (0, 1)], constant_values=-1)
    done = np.zeros(len(order), dtype=np.int64)
    inputs: Arrays = {}
    for step, number in enumerate(steps):
        due = np.take_along_axis(order, done[:, None], axis=1)[:, 0] == number
        inputs[f"step{step}"] = due & draws.jitter
        done += due
    if BRIGHTNESS in steps:
        inputs["brightness"] = draws.brightness
    if CONTRAST in steps:
        inputs["contrast"] = draws.contrast
    if SATURATION in steps:
        inputs["saturation"] = draws.saturation
    if HUE in steps:
        inputs |= _hue(augment, draws.hue)
    return inputs


def _hue(augment: AugmentSpec, hue: npt.NDArray[np.float32]) -> Arrays:
    """The turn as an exchange of channels, which is a third of the circle, and a rest of at most a sixth.

    torchvision cuts the turn to whole steps of Pillow's 8-bit H, of which 255 are a full turn. Half a step less is what
    Pillow loses by rounding H down, on average.
    """
    sixths = 6 * (np.trunc(255.0 * hue.astype(np.float64)) - 0.5) / 255
    thirds = np.where(sixths > 1, 1, np.where(sixths < -1, -1, 0))
    rest = sixths - 2 * thirds
    channels = (np.arange(3) - thirds[:, None]) % 3  # after a third, green is what red was
    following = (np.arange(3) + np.where(rest >= 0, 1, 2)[:, None]) % 3
    inputs: Arrays = {
        "hue_keep": (1 - np.abs(rest)).astype(np.float32),
        "hue_neighbour": np.take_along_axis(channels, following, axis=1).astype(np.int32),
    }
    if 6 * (augment.hue + 0.5 / 255) > 1:
        inputs |= {"hue_exchanges": thirds != 0, "hue_exchanged": channels.astype(np.int32)}
    return inputs


def _blur_kernels(sigma: npt.NDArray[np.float32], largest: float) -> npt.NDArray[np.float32]:
    """Pillow's GaussianBlur(sigma) as kernels (B, taps): the third power of a box with soft ends.

    `taps` follows from `largest` and not from the batch, so that a view does not depend on its neighbours. The radius
    of the box: Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (SSVM 2011).
    """

    def whole_radius(variance: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.floor((np.sqrt(12 * variance + 1) - 1) / 2)

    variance = sigma.astype(np.float64) ** 2 / _BOX_PASSES
    whole = whole_radius(variance)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    reach = int(whole_radius(np.array(largest**2 / _BOX_PASSES))) + 1
    distance = np.abs(np.arange(-reach, reach + 1))
    box = np.clip((whole + part)[:, None] + 1 - distance, 0, 1)
    box /= box.sum(axis=1, keepdims=True)
    kernel = box
    for _ in range(_BOX_PASSES - 1):
        wider = np.zeros((len(box), kernel.shape[1] + 2 * reach))
        for i in range(box.shape[1]):
            wider[:, i : i + kernel.shape[1]] += box[:, i, None] * kernel
        kernel = wider
    return kernel.astype(np.float32)
