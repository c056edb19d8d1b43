"""The fast CPU backend: a compiled kernel makes all views of an image in one go, in threads that never hold the GIL.

One decode per image, without what no view shows: rows below the lowest crop are left out, and colour planes that a
JPEG stores at half the size are not enlarged first: the resize reads them with the weights that enlarging would have
given them. Every operation after the resize gives Pillow's bytes (but for rare pixels after a turn of the hue), so the
difference from `exact` is that of the resize, about 0.2 grey levels; docs/pipelines.md has the table.

Ordinary JPEG files are decoded by the kernel itself, others by libjpeg. Whatever that does not take the direct way
(PNG, CMYK, odd sampling, damaged files) is decoded by Pillow as `exact` does it, and goes through the same kernel.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines import strong
from pipelines.backends import DecodeError, Job, faults_of, pillow, wait_for
from pipelines.native import kernel
from pipelines.views import ViewSpec, as_output, flatten

_TASK_IMAGES = 4  # of 1 ms each: the calls cost nothing, and no thread waits long at the end of a job
_MAX_SIDE = 2**16  # px, as much as a JPEG can have; the kernel keeps the weights of a pixel on its stack
_STRENGTHS = ("brightness", "contrast", "saturation", "hue")  # as `ViewDraws.order` numbers them


class NativeBackend:
    """Implements `pipelines.backends.Backend`; the pixels depend neither on `threads` nor on the instruction set.

    decode  "full"; or "scaled": an image of which every crop is larger than its view is decoded at 1/2, 1/4 or 1/8 of
            its size, which takes less time and is less faithful
    Raises KernelError where the kernel cannot be used.
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
        decode: str = "full",
    ) -> None:
        self.depth = depth
        self._specs = [spec for _, spec in flatten(specs)]
        self._device = torch.device(device)
        self._dtype = getattr(torch, output)
        self._kernel = kernel.Kernel()
        self._scaled = decode == "scaled"
        self._images_per_task = min(_TASK_IMAGES, max(1, batch_size // threads))
        self._buffers = [_Buffers((batch_size, s.size, s.size, 3), self._device, depth) for s in self._specs]
        self._strong = [strong_numbers(spec.size) for spec in self._specs]
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastssl-render")
        self._jobs: deque[tuple[Work, list[Future[None]]]] = deque()

    def submit(self, job: Job) -> None:
        work = Work(job, self._specs, [buffers.take(len(job.images)) for buffers in self._buffers], self._strong)
        starts = range(0, len(job.images), self._images_per_task)
        parts = [range(start, min(start + self._images_per_task, len(job.images))) for start in starts]
        self._jobs.append((work, [self._pool.submit(self._render, work, part) for part in parts]))

    def collect(self) -> list[Tensor]:
        work, tasks = self._jobs.popleft()
        wait_for(tasks)
        return [self._finish(view, spec) for view, spec in zip(work.pixels, self._specs)]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self, view: Tensor, spec: ViewSpec) -> Tensor:
        return as_output(view.permute(0, 3, 1, 2).to(self._device, non_blocking=True), spec, self._dtype)

    def _render(self, work: Work, part: range) -> None:
        self._kernel.render_files(work.files, work.num_bytes, part, work.views, self._scaled, work.done)
        faults: dict[int, str] = {}
        for i in part:
            if work.done[i] != kernel.DONE:
                faults |= faults_of(self._render_by_pillow, work, i)
        if faults:
            raise DecodeError(faults)

    def _render_by_pillow(self, work: Work, i: int) -> None:
        image = pillow.decode(work.job, i)
        if max(image.size) > _MAX_SIDE:
            fault = (
                f"{work.job.names[i]} is {image.width} x {image.height} px, but the native backend takes sides of up to"
                f" {_MAX_SIDE} px; leave it out, or use loader.backend=exact"
            )
            raise DecodeError({i: fault})
        done = self._kernel.render_pixels(np.asarray(image), i, work.views)
        if done == kernel.NO_MEMORY:
            raise MemoryError(f"no memory for the views of {work.job.names[i]}")
        if done == kernel.OTHER_SIZE:
            raise pillow.other_size(work.job, i, image)


class Work:
    """A job in the form that the kernel takes, and all that must stay alive while it runs."""

    def __init__(
        self,
        job: Job,
        specs: Sequence[ViewSpec],
        pixels: Sequence[Tensor],
        strong_numbers: Sequence[npt.NDArray[np.float64]],
    ) -> None:
        self.job, self.pixels = job, pixels
        self.done = np.zeros(len(job.images), np.int32)
        self.files, self.num_bytes = kernel.arrays(job.images)
        self._kept: list[dict[str, npt.NDArray[Any]]] = []  # what the views have the addresses of
        views = [self._view(spec, place, strong_numbers[place]) for place, spec in enumerate(specs)]
        self.views = kernel.views_array(views)

    def _view(self, spec: ViewSpec, place: int, strong_numbers: npt.NDArray[np.float64]) -> kernel.View:
        draws, augment = self.job.draws[place], spec.augment
        arrays: dict[str, npt.NDArray[Any]] = {
            name: np.ascontiguousarray(getattr(draws, name), dtype) for name, dtype in kernel.DRAWN.items()
        }
        self._kept.append(arrays)
        strengths = [getattr(augment, name) for name in _STRENGTHS]
        return kernel.View(
            pixels=self.pixels[place].data_ptr(),
            strong_numbers=strong_numbers.ctypes.data,
            size=spec.size,
            resize=spec.resize if spec.crop == "center" else 0,
            operations=sum(1 << place for place, strength in enumerate(strengths) if strength > 0),
            grayscale_first=augment.grayscale_first,
            solarize_threshold=augment.solarize_threshold,
            num_strong=augment.strong_draws,
            **{name: array.ctypes.data for name, array in arrays.items()},
        )


class _Buffers:
    """Pixels of one view, used again when the consumer has let go of them: in new memory of that size every 4 KiB is a
    page fault."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, depth: int) -> None:
        self._shape = shape
        self._pinned = device.type == "cuda"  # torch keeps pinned memory itself, and knows when a copy is done
        self._free: deque[npt.NDArray[np.uint8]] = deque(maxlen=depth + 2)

    def take(self, num: int) -> Tensor:
        """uint8 (num, S, S, 3) of any content."""
        shape = (num, *self._shape[1:])
        if self._pinned:
            return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        try:
            whole = self._free.pop()
        except IndexError:
            whole = np.empty(self._shape, np.uint8)
        part = whole[:num]  # a new array object, which lives as long as any tensor on these pixels
        weakref.finalize(part, self._free.append, whole).atexit = False
        return torch.from_numpy(part)


@functools.cache
def strong_numbers(size: int) -> npt.NDArray[np.float64]:
    """(operations, levels, 2 directions, 6): what the kernel needs to know of each strong operation.

    A factor, a number of bits or a threshold in the first place, or the six numbers of an affine transform: the centre
    (x, y) of an output pixel shows the input pixel around (a x + b y + c, d x + e y + f).
    """
    numbers = np.zeros((len(strong.POOL), strong.LEVELS, 2, 6))
    for place, operation in enumerate(strong.POOL):
        for level in range(1, strong.LEVELS + 1):
            for direction, sign in enumerate((-1, 1)):
                found = _numbers(operation, level, sign, size)
                numbers[place, level - 1, direction, : len(found)] = found
    return numbers


def _numbers(operation: str, level: int, sign: int, size: int) -> tuple[float, ...]:
    if operation in ("brightness", "saturation", "contrast", "sharpness"):
        return (strong.enhance_factor(level),)
    if operation == "posterize":
        return (strong.posterize_bits(level),)
    if operation == "solarize":
        return (strong.solarize_threshold(level),)
    if operation == "rotate":
        return _rotation(strong.rotate_deg(level, sign), size)
    if operation == "shear_x":
        return (1, strong.shear(level, sign), 0, 0, 1, 0)
    if operation == "shear_y":
        return (1, 0, 0, strong.shear(level, sign), 1, 0)
    if operation == "translate_x":
        return (1, 0, strong.translate_px(level, sign, size), 0, 1, 0)
    if operation == "translate_y":
        return (1, 0, 0, 0, 1, strong.translate_px(level, sign, size))
    return ()


def _rotation(degrees: float, size: int) -> tuple[float, ...]:
    """About the centre, counter-clockwise, as Pillow's `Image.rotate` rounds it."""
    angle, centre = -math.radians(degrees % 360.0), size / 2
    cos, sin = round(math.cos(angle), 15), round(math.sin(angle), 15)
    return (cos, sin, centre - cos * centre - sin * centre, -sin, cos, centre + sin * centre - cos * centre)
