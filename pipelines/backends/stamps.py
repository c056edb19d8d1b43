"""Views of stamps: arrays of several bands, turned about their centre, cut and stretched, on the CPU.

A galaxy has no up, keeps its scale, and is faint: so a view is the stamp turned by any angle, a window near its centre,
and the logarithm of the light. Turning and cutting are one bilinear sampling, the same as turning the whole stamp and
cutting then.

Sky noise is negative half of the time. Such pixels count as `floor` (0.1 in the authors' code), while faint positive
ones fall far below it: 1e-6 becomes -6, beside -1 for the rest of the sky. That is odd, but what they did, and kept.
"""

# C bands, H, W sides of a stamp, S side of a view in px; arrays here are (y, x, band), the memory of channels-last

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.augment import AugmentSpec
from pipelines.backends import DecodeError, Job, faults_of, wait_for
from pipelines.views import ViewSpec, flatten
from shard_tools.stamps import decode

_TASK_PX = 2**16  # px of a view that a task works on

Floats: TypeAlias = npt.NDArray[np.float32]


class StampsBackend:
    """Implements `pipelines.backends.Backend` for shards of `bands` bands; the values do not depend on `threads`.

    Views are float32 whatever `output` says, or float16 if that is asked for: light has no 256 levels.
    Raises ValueError for views that stamps cannot have.
    """

    def __init__(
        self,
        specs: Sequence[ViewSpec],
        batch_size: int,
        *,
        device: str,
        threads: int,
        output: str,
        depth: int,
        bands: int,
    ) -> None:
        self.depth = depth
        self._bands = bands
        self._specs = [spec for _, spec in flatten(specs)]
        for spec in specs:
            _check_spec(spec, specs, bands)
        self._device = torch.device(device)
        self._dtype = torch.float16 if output == "float16" else torch.float32
        largest_px = max(spec.size for spec in self._specs) ** 2
        self._stamps_per_task = min(max(1, _TASK_PX // largest_px), max(1, batch_size // threads))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastssl-render")
        self._jobs: deque[tuple[list[Tensor], list[Future[None]]]] = deque()

    def submit(self, job: Job) -> None:
        num = len(job.images)
        pinned = self._device.type == "cuda"
        views = [
            torch.empty((num, s.size, s.size, self._bands), dtype=self._dtype, pin_memory=pinned) for s in self._specs
        ]
        arrays = [view.numpy() for view in views]
        parts = [range(num)[i : i + self._stamps_per_task] for i in range(0, num, self._stamps_per_task)]
        self._jobs.append((views, [self._pool.submit(self._render, job, part, arrays) for part in parts]))

    def collect(self) -> list[Tensor]:
        views, tasks = self._jobs.popleft()
        wait_for(tasks)
        return [view.permute(0, 3, 1, 2).to(self._device, non_blocking=True) for view in views]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _render(self, job: Job, part: Sequence[int], arrays: Sequence[npt.NDArray[np.floating]]) -> None:
        """Write all views of the samples `part` into `arrays`, one (B, S, S, C) a view."""
        faults: dict[int, str] = {}
        for i in part:
            faults |= faults_of(self._render_one, job, i, arrays)
        if faults:
            raise DecodeError(faults)

    def _render_one(self, job: Job, i: int, arrays: Sequence[npt.NDArray[np.floating]]) -> None:
        stamp = self._decode(job, i)
        windows: dict[tuple[float, ...], Floats] = {}  # a view that shows where another is positive shares its own
        for spec, draws, array in zip(self._specs, job.draws, arrays):
            place = (*draws.crop[i].tolist(), draws.turn_deg[i].item())
            if place not in windows:
                windows[place] = turned_window(stamp, *place)
            array[i] = _shown(windows[place][:, ::-1] if draws.flip[i] else windows[place], spec)

    def _decode(self, job: Job, i: int) -> Floats:
        try:
            pixels = decode(job.images[i])
        except ValueError as error:
            raise DecodeError({i: f"{job.names[i]} is no good stamp: {error}; pack the data again"}) from None
        bands, height, width = pixels.shape
        if bands != self._bands:
            fault = f"{job.names[i]} has {bands} bands, but its manifest says {self._bands}; pack the data again"
            raise DecodeError({i: fault})
        largest = max(spec.size for spec in self._specs)
        if min(height, width) < largest:
            fault = f"{job.names[i]} is {width} x {height} px, smaller than a view of {largest}; lower views.*.size"
            raise DecodeError({i: fault})
        return pixels.transpose(1, 2, 0)


def turned_window(stamp: Floats, top: int, left: int, height: int, width: int, turn_deg: float) -> Floats:
    """(height, width, C): the window at (top, left) of `stamp` (H, W, C) turned counter-clockwise about its centre.

    Bilinear between the four nearest pixels, with zeros around the stamp. A turn by 0 gives the pixels as they are.
    """
    rows, columns, bands = stamp.shape
    cos, sin = math.cos(math.radians(turn_deg)), math.sin(math.radians(turn_deg))
    down = np.arange(top, top + height)[:, None] - (rows - 1) / 2  # from the centre of the turned stamp, y down
    right = np.arange(left, left + width)[None, :] - (columns - 1) / 2
    # float64: rounding must not move a whole number of px, which a turn by 0 asks for, off the pixel
    y, part_y = _split(sin * right + cos * down + (rows - 1) / 2, rows)
    x, part_x = _split(cos * right - sin * down + (columns - 1) / 2, columns)

    padded = np.zeros((rows + 3, columns + 3, bands), np.float32)
    padded[1:-2, 1:-2] = stamp
    pixels = padded.reshape(-1, bands)
    corner = y * (columns + 3) + x
    above = pixels.take(corner, axis=0) * (1 - part_x)
    above += pixels.take(corner + 1, axis=0) * part_x
    below = pixels.take(corner + columns + 3, axis=0) * (1 - part_x)
    below += pixels.take(corner + columns + 4, axis=0) * part_x
    above *= 1 - part_y
    below *= part_y
    above += below
    return above


def _split(place: npt.NDArray[np.float64], length: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Places along an axis as (row of the padded stamp, fraction beyond it (..., 1)); -1 and `length` are zeros."""
    place = place.clip(-1, length)
    whole = np.floor(place)
    return whole.astype(np.int64) + 1, (place - whole).astype(np.float32)[..., None]


def _shown(window: Floats, spec: ViewSpec) -> Floats:
    """What the view shows of a window (S, S, C)."""
    if spec.shows == "positive":
        return (window > 0).astype(np.float32)
    mean, std = (np.array(numbers, np.float32) for numbers in (spec.augment.mean, spec.augment.std))
    return (stretch(window, spec.augment) - mean) / std


def stretch(pixels: Floats, augment: AugmentSpec) -> Floats:
    """The pixels in the scale that `augment.stretch` names, before the normalisation."""
    if augment.stretch == "none":
        return pixels
    return np.log10(np.where(pixels > 0, pixels, np.float32(augment.floor)))


def _check_spec(spec: ViewSpec, specs: Sequence[ViewSpec], bands: int) -> None:
    augment, where = spec.augment, f"views.{spec.role}"
    if spec.crop != "turned":
        raise ValueError(
            f"{where}.crop is {spec.crop!r}, but stamps are not resized; write crop: turned, with turn_deg: 0 and"
            " shift_px: 0 for the centre"
        )
    photo = {"jitter_p": 0.0, "grayscale_p": 0.0, "blur_p": 0.0, "solarize_p": 0.0, "strong_draws": 0}
    for key, off in photo.items():
        if getattr(augment, key) != off:
            raise ValueError(f"{where}.augment.{key} is {getattr(augment, key)}, but is for photographs; set it to 0")
    if spec.shows == "pixels" and len(augment.mean) not in (1, bands):
        raise ValueError(
            f"{where}.augment.mean is {augment.mean}, but the stamps have {bands} bands; give one number, or {bands}"
        )
    if spec.shows == "positive" and spec.same_as:
        _check_same(spec, next(other for other in specs if other.role == spec.same_as))


def _check_same(spec: ViewSpec, other: ViewSpec) -> None:
    """The same random numbers make the same window only by the same recipe."""
    for key in ("size", "turn_deg", "shift_px"):
        if getattr(spec, key) != getattr(other, key):
            raise ValueError(
                f"views.{spec.role}.{key} is {getattr(spec, key)}, but must be {getattr(other, key)} as in"
                f" views.{other.role}, whose window it shows"
            )
    if spec.augment.flip_p != other.augment.flip_p:
        raise ValueError(
            f"views.{spec.role}.augment.flip_p is {spec.augment.flip_p}, but must be {other.augment.flip_p} as in"
            f" views.{other.role}, whose window it shows"
        )
