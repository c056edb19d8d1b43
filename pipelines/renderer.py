"""Planned steps to batches: read ahead, draw, hand to the backend, and put others in the places of bad samples."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.backends import Backend, DecodeError, Job, make
from pipelines.bad_samples import ATTEMPTS, header_fault, replacement
from pipelines.draw import draw_view
from pipelines.order import Order
from pipelines.reader import Part, Reader, whole
from pipelines.views import ViewSpec, by_role, flatten
from shard_tools.manifest import Manifest, ShardError

_REMEDY = "pack the data again with --on-bad quarantine"
_READ_THREADS = 8  # they wait for storage rather than work, so they are not counted among the cores


@dataclass
class Batch:
    """One rank's part of a step.

    views   role -> list of (B, C, S, S) in channels-last memory, as many as the role's specs count together; C is 3,
            or the bands of stamps
    labels  int64 (B,), -1 where the data has none
    ids     int64 (B,), rows of the manifest's index
    step    the global step, counted from 0
    replaced    what was wrong with samples whose places others have taken, one sentence each; labels and ids are those
                of the others
    """

    views: dict[str, list[Tensor]]
    labels: Tensor
    ids: Tensor
    step: int
    replaced: tuple[str, ...] = ()


Step = tuple[int, int, Order]  # global step, epoch, rows of this rank
_Reading = tuple[int, int, Order, Sequence[Part]]


@dataclass
class _Pending:
    """A batch on its way. rows and images are those to render; `attempts` counts the replacements of a place."""

    step: int
    epoch: int
    planned: Order
    rows: Order
    images: list[bytes]
    attempts: dict[int, int]
    replaced: list[str]


class Renderer:
    """Turns planned steps into batches: reads ahead, draws, and keeps `depth` jobs in the backend."""

    def __init__(
        self,
        manifest: Manifest,
        specs: Sequence[ViewSpec],
        *,
        batch_size: int,
        seed: int,
        backend: str,
        device: str,
        threads: int,
        depth: int,
        output: str,
        replace: bool = False,
        decode: str = "full",
    ) -> None:
        self._manifest, self._specs, self._seed, self._depth, self._device = manifest, specs, seed, depth, device
        self._replace = replace
        self._backend: Backend = make(
            backend,
            specs,
            batch_size,
            device=device,
            threads=threads,
            output=output,
            depth=depth,
            bands=manifest.bands,
            decode=decode,
        )
        self.reader = Reader(manifest, _READ_THREADS)
        self._index = self.reader.index  # 36 bytes a sample: not twice
        self._in_backend: deque[_Pending] = deque()
        # Collected out of turn, because a batch before them has to be rendered again.
        self._collected: deque[tuple[_Pending, list[Tensor] | DecodeError]] = deque()

    def batches(self, plan: Iterable[Step]) -> Iterator[Batch]:
        self._discard()
        for step, epoch, rows, reading in self._read_ahead(plan):
            images = [image for part in reading for image in part.result()]
            try:
                pending = self._pending(step, epoch, rows, images)
            except (DecodeError, ShardError):  # the batches before are good
                while self._in_backend or self._collected:
                    yield self._collect()
                raise
            self._submit(pending)
            if len(self._in_backend) + len(self._collected) == self._depth:
                yield self._collect()
        while self._in_backend or self._collected:
            yield self._collect()

    def close(self) -> None:
        self.reader.close()
        self._backend.close()

    def _read_ahead(self, plan: Iterable[Step]) -> Iterator[_Reading]:
        started: deque[_Reading] = deque()
        for step, epoch, rows in plan:
            started.append((step, epoch, rows, self.reader.request(rows)))
            if len(started) > self._depth:
                yield started.popleft()
        yield from started

    def _pending(self, step: int, epoch: int, rows: Order, images: Sequence[bytes | ShardError]) -> _Pending:
        """The batch to render, with replacements for samples that could not be read or must not be decoded."""
        files = list(images) if self._replace else whole(images)
        faults = self._faults(rows, files)
        if faults and not self._replace:
            raise DecodeError(faults)
        kept = [b"" if isinstance(file, ShardError) else file for file in files]
        pending = _Pending(step, epoch, rows, rows.copy(), kept, {}, [])
        self._replace_samples(pending, faults)
        return pending

    def _faults(self, rows: Order, files: Sequence[bytes | ShardError]) -> dict[int, str]:
        """What no backend gets to see: place in the batch -> why.

        An image whose header does not claim the size that its row has is none of those that were packed. Rows are
        known to be of possible sizes, so nothing grows beyond them, and a bomb costs no more than its header.
        """
        faults = {}
        sizes = self._index[rows][["width", "height"]].tolist()
        for i, (file, size) in enumerate(zip(files, sizes, strict=True)):
            if isinstance(file, ShardError):
                faults[i] = str(file)
            elif not self._manifest.bands and (what := header_fault(file, size)):
                faults[i] = f"{self.reader.name(int(rows[i]))} cannot be decoded ({what}); {_REMEDY}"
        return faults

    def _submit(self, pending: _Pending) -> None:
        rows, epoch = pending.rows, pending.epoch
        entries = self._index[rows]
        draws = [
            draw_view(spec, view, self._seed, epoch, rows, entries["width"], entries["height"])
            for view, spec in flatten(self._specs)
        ]
        self._in_backend.append(pending)
        self._backend.submit(Job(pending.images, draws, _Names(self.reader, rows)))

    def _collect(self) -> Batch:
        pending, result = self._collected.popleft() if self._collected else self._from_backend()
        while isinstance(result, DecodeError):
            if not self._replace:
                raise result
            # The backend gives back jobs in order, so those behind come out first, and wait.
            self._collected.extend(self._from_backend() for _ in range(len(self._in_backend)))
            self._replace_samples(pending, result.faults)
            self._submit(pending)
            pending, result = self._from_backend()
        labels = torch.from_numpy(self._index[pending.rows]["label"].astype(np.int64)).to(self._device)
        ids = torch.from_numpy(pending.rows.astype(np.int64)).to(self._device)
        return Batch(by_role(self._specs, result), labels, ids, pending.step, tuple(pending.replaced))

    def _from_backend(self) -> tuple[_Pending, list[Tensor] | DecodeError]:
        pending = self._in_backend.popleft()
        try:
            return pending, self._backend.collect()
        except DecodeError as error:
            return pending, error

    def _replace_samples(self, pending: _Pending, faults: Mapping[int, str]) -> None:
        """Put other samples in the places of `faults`. Raises ShardError when too many in a row are bad as well."""
        waiting = dict(faults)
        while waiting:
            i, fault = waiting.popitem()
            pending.replaced.append(fault)
            attempt = pending.attempts.get(i, 0)
            if attempt == ATTEMPTS:
                raise ShardError(
                    f"{ATTEMPTS} samples that should have replaced a bad one are bad too, the last: {fault}"
                )
            pending.attempts[i] = attempt + 1
            planned = int(pending.planned[i])
            row = replacement(self._seed, pending.epoch, planned, attempt, self._manifest.num_samples)
            pending.rows[i] = row
            ((image,),) = [part.result() for part in self.reader.request(np.array([row]))]
            unfit = self._faults(np.array([row]), [image])
            if unfit or isinstance(image, ShardError):
                waiting[i] = unfit[0]
            else:
                pending.images[i] = image

    def _discard(self) -> None:
        """Take out what an iterator that ended early left in the backend."""
        self._collected.clear()
        while self._in_backend:
            self._in_backend.popleft()
            with contextlib.suppress(Exception):
                self._backend.collect()


class _Names(Sequence[str]):
    """The names of a batch's samples, looked up when a message needs one: each costs a read."""

    def __init__(self, reader: Reader, rows: Order) -> None:
        self._reader, self._rows = reader, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return _Names(self._reader, self._rows[i])
        return self._reader.name(int(self._rows[i]))
