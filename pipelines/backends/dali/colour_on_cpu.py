"""The colour chain after DALI's crops on a CPU: that of the exact backend, bit for bit, on many images at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipelines.augment import AugmentSpec
from pipelines.backends import wait_for
from pipelines.backends.exact import Pixels, apply_chain, apply_strong
from pipelines.draw import ViewDraws
from pipelines.views import ViewSpec, normalize

# px of a view that a task works on at once. Most operations are for some samples only, so with few images the calls
# cost more than the pixels; beyond this the arrays leave the cache.
_TASK_PX = 2**18


class ColourOnCpu:
    """Views (B, S, S, 3) as the graph leaves them, to finished ones (B, 3, S, S) in channels-last memory.

    The flip is taken to be done. The pixels do not depend on `threads`.
    """

    def __init__(self, specs: Sequence[ViewSpec], threads: int, output: str) -> None:
        self._specs = specs
        self._dtype = getattr(torch, output)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastssl-colour")

    def __call__(self, views: Sequence[Tensor], draws: Sequence[ViewDraws]) -> list[Tensor]:
        """In place on `views` where the output is uint8."""
        tasks = []
        for view, spec, view_draws in zip(views, self._specs, draws):
            pixels, step = view.numpy(), max(1, _TASK_PX // spec.size**2)
            parts = [slice(first, min(first + step, len(pixels))) for first in range(0, len(pixels), step)]
            tasks += [self._pool.submit(_apply, pixels, spec.augment, view_draws, part) for part in parts]
        wait_for(tasks)
        return [self._finish(view.permute(0, 3, 1, 2), spec) for view, spec in zip(views, self._specs)]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self, view: Tensor, spec: ViewSpec) -> Tensor:
        return view if self._dtype == torch.uint8 else normalize(view, spec.augment.mean, spec.augment.std, self._dtype)


def _apply(pixels: Pixels, augment: AugmentSpec, draws: ViewDraws, part: slice) -> None:
    planes = np.ascontiguousarray(pixels[part].transpose(3, 0, 1, 2))
    apply_chain(planes, augment, draws, part)
    for channel in range(3):
        pixels[part, ..., channel] = planes[channel]
    apply_strong(pixels[part], draws, part)
