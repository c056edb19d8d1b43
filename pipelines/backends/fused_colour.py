"""The chain of `AugmentSpec` after the crop, on the training device: a few Triton kernels a view, Pillow's numbers.

A view goes through four kernels, and through two more for each strong draw (fused_colour_kernels.py). One launch serves
the whole batch: what a sample needs is a row of numbers, and a block of pixels takes the branch that its sample says.
The kernels of a view are launched one after another on the current stream, so each sees the pixels of the one before.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
from torch import Tensor

from pipelines import strong
from pipelines.backends import colour
from pipelines.backends import fused_colour_kernels as kernels
from pipelines.draw import ViewDraws
from pipelines.views import ViewSpec

BLOCK = 1024  # pixels or values a program, eight a thread
_PILLOW_UNIT = 2.0**-16  # px; Pillow's affine transformations count in whole numbers of it


class FusedColour:
    """Views (B, S, S, 3) as DALI crops and flips them, to finished ones (B, 3, S, S) in channels-last memory.

    Never waits for the device. All numbers of a job go there in one copy from pinned memory.
    """

    def __init__(self, specs: Sequence[ViewSpec], device: torch.device, output: str, block: int = BLOCK) -> None:
        self._specs, self._device, self._dtype, self._block = specs, device, getattr(torch, output), block
        self._in_use: deque[tuple[torch.cuda.Event, Sequence[Tensor]]] = deque()

    def __call__(self, views: Sequence[Tensor], draws: Sequence[ViewDraws]) -> list[Tensor]:
        """Leaves `views` as they are."""
        tables = [numbers(spec, of_view) for spec, of_view in zip(self._specs, draws)]
        packed = torch.from_numpy(np.concatenate([table.ravel() for table in tables]))
        if self._device.type == "cuda":
            packed = packed.pin_memory().to(self._device, non_blocking=True)
        rows = packed.split([table.size for table in tables])
        with torch.cuda.device_of(packed):  # Triton launches on the device of the thread
            finished = [self._render(*given) for given in zip(views, self._specs, rows)]
            self._keep(views)
        return finished

    def close(self) -> None:
        self._in_use.clear()

    def _render(self, view: Tensor, spec: ViewSpec, rows: Tensor) -> Tensor:
        augment, num, size = spec.augment, len(view), spec.size
        floats, row = rows.view(torch.float32), rows.numel() // num
        pixels, values = (num, triton.cdiv(size**2, self._block)), (num, triton.cdiv(3 * size**2, self._block))
        given: dict[str, Any] = {"row": row, "size": size, "BLOCK": self._block, "enable_fp_fusion": False}
        first = {"GRAYSCALE_FIRST": augment.grayscale_first}
        if augment.jitter_p > 0 and augment.contrast > 0:
            kernels.mean_luma[pixels](view, rows, floats, **first, **given)
        now, spare = torch.empty_like(view), torch.empty_like(view)
        kernels.jitter[pixels](view, now, rows, floats, **first, **given)
        reach = box_reach(spec)
        if augment.blur_p > 0:
            kernels.blur_rows[values](now, spare, rows, REACH=reach, **given)
        result = torch.empty((num, size, size, 3), dtype=self._dtype, device=view.device)
        shaped = _scale_and_bias(spec)
        last = {"NORMALIZED": self._dtype != torch.uint8, **shaped}
        between = {"NORMALIZED": False, **shaped}
        draws = augment.strong_draws
        out, written = (torch.empty_like(view), between) if draws else (result, last)
        blur = {"BLURS": augment.blur_p > 0, "REACH": reach}
        kernels.finish[values](now, spare, out, rows, augment.solarize_threshold, **blur, **written, **given)
        tables = torch.empty((num, 3, 256) if draws else 0, dtype=torch.uint8, device=view.device)
        for draw in range(draws):
            before, spare = out, now
            out, written = (result, last) if draw == draws - 1 else (spare, between)
            now = before  # where the next draw may write
            start = _first_strong(spec) + draw * kernels.STRONG_NUMBERS
            kernels.strong_table[(num,)](before, tables, rows, floats, start, **given)
            kernels.strong_apply[pixels](before, tables, out, rows, floats, start, **written, **given)
        return result.permute(0, 3, 1, 2)

    def _keep(self, views: Sequence[Tensor]) -> None:
        """Until the kernels have read them: their memory is DALI's, which does not know of this stream."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._in_use.append((event, views))
            while self._in_use[0][0].query() and len(self._in_use) > 1:
                self._in_use.popleft()


def _scale_and_bias(spec: ViewSpec) -> dict[str, float]:
    """(pixels / 255 - mean) / std as pixels * scale + bias."""
    channels = zip("rgb", spec.augment.mean, spec.augment.std)
    pairs = [(channel, 1 / (255 * std), -mean / std) for channel, mean, std in channels]
    return {f"scale_{c}": scale for c, scale, _ in pairs} | {f"bias_{c}": bias for c, _, bias in pairs}


def numbers(spec: ViewSpec, draws: ViewDraws) -> npt.NDArray[np.int32]:
    """(B, numbers of a row) for all samples of a view."""
    augment, num = spec.augment, len(draws.flip)
    table = np.zeros((num, _first_strong(spec) + augment.strong_draws * kernels.STRONG_NUMBERS), dtype=np.int32)
    floats = table.view(np.float32)
    strengths = np.array([augment.brightness, augment.contrast, augment.saturation, augment.hue])
    active = (strengths > 0)[draws.order] & draws.jitter[:, None]
    to_front = np.argsort(~active, axis=1, kind="stable")
    order = np.take_along_axis(np.where(active, draws.order, -1), to_front, axis=1)
    is_contrast = order == kernels.CONTRAST.value
    table[:, kernels.ORDER.value : kernels.ORDER.value + 4] = order
    table[:, kernels.BEFORE_CONTRAST.value] = np.where(is_contrast.any(axis=1), is_contrast.argmax(axis=1), -1)
    table[:, kernels.HUE_STEPS.value] = np.trunc(draws.hue.astype(np.float64) * 255)  # as torchvision does
    table[:, kernels.GRAYSCALE.value] = draws.grayscale
    table[:, kernels.BLUR.value] = draws.sigma > 0
    table[:, kernels.SOLARIZE.value] = draws.solarize
    floats[:, kernels.BRIGHTNESS_FACTOR.value] = draws.brightness
    floats[:, kernels.CONTRAST_FACTOR.value] = draws.contrast
    floats[:, kernels.SATURATION_FACTOR.value] = draws.saturation
    whole, near, far = colour.box_weights(draws.sigma)
    away = np.arange(box_reach(spec) + 1)
    weights = np.where(away <= whole[:, None], near[:, None], np.where(away == whole[:, None] + 1, far[:, None], 0))
    table[:, kernels.WEIGHTS.value : _first_strong(spec)] = weights.astype(np.uint32).view(np.int32)
    for draw in range(augment.strong_draws):
        start = _first_strong(spec) + draw * kernels.STRONG_NUMBERS
        _fill_strong(table[:, start:], floats[:, start:], spec.size, draws, draw)
    return table


def box_reach(spec: ViewSpec) -> int:
    """px that a box blur of the view's largest sigma reaches to either side."""
    whole, _, _ = colour.box_weights(np.array([spec.augment.blur_sigma[1]], dtype=np.float32))
    return int(whole[0]) + 1


def _first_strong(spec: ViewSpec) -> int:
    return kernels.WEIGHTS.value + box_reach(spec) + 1


def _fill_strong(
    table: npt.NDArray[np.int32], floats: npt.NDArray[np.float32], size: int, draws: ViewDraws, draw: int
) -> None:
    """The numbers of draw number `draw`, into the first columns of `table` and `floats`, which are the same memory."""
    operation, level, sign = draws.strong_operation[:, draw], draws.strong_level[:, draw], draws.strong_sign[:, draw]
    levels = range(1, strong.LEVELS + 1)
    table[:, kernels.KIND.value] = operation
    table[:, kernels.BITS.value] = np.array([-(2 ** (8 - strong.posterize_bits(v))) for v in levels])[level - 1]
    table[:, kernels.THRESHOLD.value] = np.array([strong.solarize_threshold(v) for v in levels])[level - 1]
    floats[:, kernels.FACTOR.value] = np.array([strong.enhance_factor(v) for v in levels], dtype=np.float32)[level - 1]
    table[:, kernels.MATRIX.value : kernels.STRONG_NUMBERS] = _matrices(size)[operation, level, sign]


@functools.lru_cache(maxsize=16)  # a matrix at a time would take longer than all other numbers
def _matrices(size: int) -> npt.NDArray[np.int32]:
    """(operation, level, sign, 6): rows of a matrix that takes (x, y, 1) of a pixel to the place that it shows.

    In whole numbers as Pillow computes them: from the centre of the pixel, and each number rounded.
    """
    matrices = np.empty((len(strong.POOL), strong.LEVELS + 1, 3, 6), dtype=np.int32)  # sign -1 is the last of 3
    for place, level, sign in np.ndindex(*matrices.shape[:3]):
        matrix = _matrix(strong.POOL[place], level, 1 - 2 * (sign == 2), size)
        matrix[:, 2] = matrix @ [0.5, 0.5, 1.0]
        matrices[place, level, sign] = np.floor(matrix / _PILLOW_UNIT + 0.5).ravel()
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
