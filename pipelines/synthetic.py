"""Batches of random pixels with a loader's interface: for tests of methods, and to time training without loading."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipelines.loader import Batch, check_batch_size
from pipelines.order import Order, order, rows_for_step
from pipelines.philox import check_seed, philox
from pipelines.views import ViewSpec, by_role, flatten, normalize

_POOL_BYTES = 2**24  # random bytes in all; every view is a stretch of them, so that a batch costs one copy
_MIDDLE, _DEVIATION = 127.5, 73.9  # of bytes that are all equally likely
_BLOCK = 0x10000  # of the counter; far from the blocks of `pipelines.draw`


class SyntheticLoader:
    """What `pipelines.loader.Loader` is for a data set of `num_samples` images of noise with labels `id % num_classes`.

    The pixels of a view are a pure function of (seed, epoch, sample, view), so ranks and resumes behave as with real
    data. num_classes 0 means no labels: all -1. `close` does nothing.

    channels    3 for photographs; of stamps, the bands: their views are floats of mean 0 and deviation 1, whatever
                `output` says and the views' own mean and std are
    """

    def __init__(
        self,
        specs: Sequence[ViewSpec],
        *,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        num_samples: int = 4096,
        num_classes: int = 10,
        channels: int = 3,
        seed: int = 0,
        output: str = "uint8",
        device: str = "cpu",
    ) -> None:
        check_batch_size(batch_size, world, num_samples, "the synthetic data")
        check_seed(seed)
        self.steps_per_epoch, self.dropped_per_epoch = divmod(num_samples, batch_size)
        self._specs, self._dtype, self._device = specs, getattr(torch, output), torch.device(device)
        self._batch_size, self._rank, self._world, self._seed = batch_size, rank, world, seed
        self._num_samples, self._num_classes, self._channels = num_samples, num_classes, channels
        what = ["synthetic", [dataclasses.asdict(spec) for spec in specs], batch_size, num_samples, num_classes, seed]
        what += [channels]
        self.fingerprint = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        generator = torch.Generator().manual_seed(seed % 2**63)
        self._pool = torch.randint(256, (_POOL_BYTES,), dtype=torch.uint8, generator=generator).to(self._device)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches of steps start_step, start_step + 1, ... without end."""
        epoch, first = divmod(start_step, self.steps_per_epoch)
        while True:
            permutation = order(self._num_samples, self._seed, epoch)
            for step in range(first, self.steps_per_epoch):
                rows = rows_for_step(permutation, step, self._batch_size, self._rank, self._world)
                yield self._batch(epoch * self.steps_per_epoch + step, epoch, rows)
            epoch, first = epoch + 1, 0

    def close(self) -> None: ...

    def __enter__(self) -> SyntheticLoader:
        return self

    def __exit__(self, *_: object) -> None: ...

    def _batch(self, step: int, epoch: int, rows: Order) -> Batch:
        views = by_role(self._specs, [self._noise(view, spec, epoch, rows) for view, spec in flatten(self._specs)])
        ids = torch.from_numpy(rows.astype(np.int64)).to(self._device)
        labels = ids % self._num_classes if self._num_classes else torch.full_like(ids, -1)
        return Batch(views, labels, ids, step)

    def _noise(self, view: int, spec: ViewSpec, epoch: int, rows: Order) -> Tensor:
        length = self._channels * spec.size**2
        words, _, _, _ = philox(self._seed, (_BLOCK, view, rows, epoch))
        starts = torch.from_numpy((words % np.uint64(_POOL_BYTES - length)).astype(np.int64)).to(self._device)
        pixels = self._pool.unfold(0, length, 1)[starts].view(-1, spec.size, spec.size, self._channels)
        pixels = pixels.permute(0, 3, 1, 2)
        floats = torch.float16 if self._dtype == torch.float16 else torch.float32
        if spec.shows == "positive":
            return (pixels >= _MIDDLE).to(floats)
        if self._channels != 3:
            return ((pixels - _MIDDLE) / _DEVIATION).to(floats)
        if self._dtype == torch.uint8:
            return pixels
        return normalize(pixels, spec.augment.mean, spec.augment.std, self._dtype)
