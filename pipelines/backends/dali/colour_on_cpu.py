"""The colour chain after DALI's crops on a CPU: the compiled kernel of the native backend or, where that is not built,
the NumPy of the exact one on many images at once. Both give Pillow's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import AugmentSpec
from pipelines.backends import Job, wait_for
from pipelines.backends.exact import Pixels, apply_chain, apply_strong
from pipelines.backends.native import Work, strong_numbers
from pipelines.draw import ViewDraws
from pipelines.native import kernel
from pipelines.views import ViewSpec, as_output

# px of a view that a task works on at once. In NumPy most operations are for some samples only, so with few images the
# calls cost more than the pixels; beyond this the arrays leave the cache.
_TASK_PX = 2**18


class ColourOnCpu:
    """Views (B, S, S, 3) as the graph leaves them, to finished ones (B, 3, S, S) in channels-last memory.

    The flip is taken to be done. The pixels do not depend on `threads`.
    """

    def __init__(self, specs: Sequence[ViewSpec], threads: int, output: str, *, compiled: bool | None = None) -> None:
        """compiled: whether by the kernel; where it can be used by default."""
        self._specs = specs
        self._dtype = getattr(torch, output)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastssl-colour")
        self._kernel = kernel.Kernel() if (not kernel.why_not() if compiled is None else compiled) else None
        self._plain = [replace(spec, crop="random_resized") for spec in specs]  # the window is `_whole`'s

    def __call__(self, views: Sequence[Tensor], draws: Sequence[ViewDraws]) -> list[Tensor]:
        """In place on `views` where the output is uint8."""
        whole = [_whole(spec, of_view) for spec, of_view in zip(self._specs, draws)]
        numbers = [strong_numbers(spec.size) for spec in self._specs]
        work = Work(Job([], whole, []), self._plain, views, numbers)  # alive while the kernel runs
        tasks: list[Future[None]] = []
        for place, (view, spec) in enumerate(zip(views, self._specs)):
            if _is_nothing(spec.augment):
                continue
            pixels, step = view.numpy(), max(1, _TASK_PX // spec.size**2)
            for first in range(0, len(pixels), step):
                part = range(first, min(first + step, len(pixels)))
                if self._kernel:
                    tasks.append(self._pool.submit(self._apply_compiled, pixels, work.views[place], part))
                else:
                    tasks.append(self._pool.submit(_apply, pixels, spec.augment, draws[place], part))
        wait_for(tasks)
        return [as_output(view.permute(0, 3, 1, 2), spec, self._dtype) for view, spec in zip(views, self._specs)]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _apply_compiled(self, pixels: Pixels, view: kernel.View, part: range) -> None:
        assert self._kernel is not None
        only = kernel.views_array([view])
        for i in part:
            if self._kernel.render_pixels(pixels[i], i, only) != kernel.DONE:
                raise MemoryError("no memory for the colour of a view")


def _whole(spec: ViewSpec, draws: ViewDraws) -> ViewDraws:
    """The draws of views that are cropped already: the window is all of the view, which the kernel's resize keeps."""
    crop = np.tile(np.array([0, 0, spec.size, spec.size], dtype=np.int32), (len(draws.flip), 1))
    return replace(draws, crop=crop, flip=np.zeros_like(draws.flip))


def _is_nothing(augment: AugmentSpec) -> bool:
    chances = (augment.jitter_p, augment.grayscale_p, augment.blur_p, augment.solarize_p)
    return not any(chances) and augment.strong_draws == 0


def _apply(pixels: Pixels, augment: AugmentSpec, draws: ViewDraws, part: range) -> None:
    rows = slice(part.start, part.stop)
    planes = np.ascontiguousarray(pixels[rows].transpose(3, 0, 1, 2))
    apply_chain(planes, augment, draws, rows)
    for channel in range(3):
        pixels[rows, ..., channel] = planes[channel]
    apply_strong(pixels[rows], draws, rows)
