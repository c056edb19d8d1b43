"""Shards to batches: order, read, draw, render, in one background thread that stays a few batches ahead.

The batch of a step is a pure function of (data, views, batch size, seed, step): the number of ranks, threads,
prefetching and the steps made before do not matter. So the number of the next step is all the state that a loader has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.backends import Backend, DecodeError, Job, make
from pipelines.bad_samples import ATTEMPTS, replacement
from pipelines.draw import draw_view
from pipelines.order import Order, order, rows_for_step, windowed_order
from pipelines.philox import check_seed
from pipelines.reader import Reader, whole
from pipelines.views import ViewSpec, by_role, flatten
from pipelines.views import normalize as normalize  # the other half of a uint8 batch, for the training side
from shard_tools.manifest import Manifest, ShardError

ORDERS = ("global", "window")
FORMAT_VERSION = 1  # of what a step means; raised when the same settings would give other batches

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


class Loader:
    """Batches of one split for one rank, without end.

    batch_size  the global batch; each rank gets batch_size / world of it
    threads     for the backend; 0 takes the cores of this process divided by the ranks on this host
    prefetch    batches that are being made while the consumer works
    output      "uint8": raw pixels, for `normalize`; "float32" or "float16": normalised. Stamps are always normalised
    order       "global", or "window" for network storage (see order.py)
    on_bad      "fail" at a sample that cannot be read or decoded, or "replace" it (see bad_samples.py); its neighbours
                keep their views

    bad_samples     row -> what is wrong with it, of those that were replaced so far
    steps_per_epoch     the same on every rank
    dropped_per_epoch   samples that do not fill the last global batch of an epoch; other ones in each epoch
    fingerprint         sha256 of all that decides what a step holds; to be compared at a resume
    Raises ValueError, or ShardError which is one, with the remedy, for settings or shards that cannot be used.
    """

    def __init__(
        self,
        manifest: Manifest,
        specs: Sequence[ViewSpec],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        backend: str = "auto",
        device: str = "cpu",
        threads: int = 0,
        prefetch: int = 2,
        output: str = "uint8",
        order: str = "global",
        on_bad: str = "fail",
    ) -> None:
        _check(manifest, specs, threads, prefetch)
        check_seed(seed)
        check_batch_size(batch_size, world, manifest.num_samples, f"{manifest.split} in {manifest.root}")
        if order not in ORDERS:
            raise ValueError(f"loader.order is {order!r}, but must be one of {', '.join(ORDERS)}")
        if on_bad not in ("fail", "replace"):
            raise ValueError(f"loader.on_bad is {on_bad!r}, but must be fail or replace")
        self.steps_per_epoch = manifest.num_samples // batch_size
        self.dropped_per_epoch = manifest.num_samples % batch_size
        self.fingerprint = _fingerprint(
            manifest=manifest.digest, specs=_plain(specs), batch_size=batch_size, seed=seed, order=order
        )
        self._manifest = manifest
        self._batch_size, self._seed, self._rank, self._world, self._order = batch_size, seed, rank, world, order
        self._renderer = _Renderer(
            manifest,
            specs,
            batch_size=batch_size // world,
            seed=seed,
            backend=backend,
            device=device,
            threads=threads,
            depth=prefetch,
            output=output,
            replace=on_bad == "replace",
        )
        self._stream: _Stream | None = None

    @property
    def bad_samples(self) -> dict[int, str]:
        return self._renderer.bad_samples

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches of steps start_step, start_step + 1, ... One iterator at a time: a new one ends the one before.

        Errors of the background thread are raised here: ShardError for bytes, DecodeError for an image.
        """
        if self._stream is not None:
            self._stream.close()
        self._stream = _Stream(self._renderer.batches(self._plan(start_step)))
        return self._stream

    def close(self) -> None:
        """Ends the threads; harmless when repeated."""
        if self._stream is not None:
            self._stream.close()
        self._renderer.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _plan(self, start_step: int) -> Iterator[_Step]:
        """(step, epoch, rows) from `start_step` on, without end."""
        epoch, first = divmod(start_step, self.steps_per_epoch)
        while True:
            permutation = self._permutation(epoch)
            for step in range(first, self.steps_per_epoch):
                rows = rows_for_step(permutation, step, self._batch_size, self._rank, self._world)
                yield epoch * self.steps_per_epoch + step, epoch, rows
            epoch, first = epoch + 1, 0

    def _permutation(self, epoch: int) -> Order:
        if self._order == "window":
            return windowed_order([shard.num_samples for shard in self._manifest.shards], self._seed, epoch)
        return order(self._manifest.num_samples, self._seed, epoch)


def read_once(
    manifest: Manifest,
    specs: Sequence[ViewSpec],
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    backend: str = "auto",
    device: str = "cpu",
    threads: int = 0,
    output: str = "uint8",
    limit: int = 0,
    rows: npt.ArrayLike | None = None,
    seed: int = 0,
    epoch: int = 0,
) -> Iterator[Batch]:
    """Each sample once over the ranks, in the order of `rows`; the last batch of a rank may be smaller.

    Rank r gets the r-th of `world` contiguous parts, whose lengths differ by at most one, batch_size / world at a time.

    limit       only the first `limit` samples; 0 is all
    rows        ids of the samples; all of the split by default
    seed, epoch     for views with randomness: those that a Loader with this seed makes in this epoch
    `Batch.step` counts this rank's batches. Raises as Loader does.
    """
    _check(manifest, specs, threads, prefetch=1)
    check_seed(seed)
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}, but must be 1 or more")
    wanted = np.arange(manifest.num_samples) if rows is None else np.asarray(rows, dtype=np.int64)
    if len(wanted) and not 0 <= wanted.min() <= wanted.max() < manifest.num_samples:
        raise ValueError(
            f"sample ids go from {wanted.min()} to {wanted.max()}, but {manifest.split} holds 0 to"
            f" {manifest.num_samples - 1}; ask for these"
        )
    wanted = wanted[: limit or None]
    mine = wanted[len(wanted) * rank // world : len(wanted) * (rank + 1) // world]
    share = min(max(1, batch_size // world), max(1, len(mine)))
    plan = ((step, epoch, mine[first : first + share]) for step, first in enumerate(range(0, len(mine), share)))
    renderer = _Renderer(
        manifest,
        specs,
        batch_size=share,
        seed=seed,
        backend=backend,
        device=device,
        threads=threads,
        depth=2,
        output=output,
    )
    return _read_all(renderer, plan)


def check_batch_size(batch_size: int, world: int, num_samples: int, where: str) -> None:
    """Raises ValueError unless `world` ranks can share a global batch that the data fills at least once."""
    if batch_size < 1:
        raise ValueError(f"run.batch_size is {batch_size}, but must be 1 or more")
    if batch_size > num_samples:
        raise ValueError(
            f"run.batch_size is {batch_size}, but {where} holds only {num_samples} samples; use at most {num_samples}"
        )
    if batch_size % world:
        raise ValueError(
            f"run.batch_size is {batch_size}, which {world} ranks cannot share equally; use a multiple of {world}"
        )


def available_cores() -> int:
    """CPU cores for this rank: those the process may run on, divided by the ranks on this host (LOCAL_WORLD_SIZE)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _check(manifest: Manifest, specs: Sequence[ViewSpec], threads: int, prefetch: int) -> None:
    if not specs:
        raise ValueError("there are no views, but a method reads one at least; write views.ROLE")
    if threads < 0:
        raise ValueError(f"loader.threads is {threads}, but must be 0 (all cores) or more")
    if prefetch < 1:
        raise ValueError(f"loader.prefetch is {prefetch}, but must be 1 or more")
    if faults := manifest.check_quick():
        raise ShardError(
            f"{manifest.split} cannot be used: {'; '.join(faults)}. Restore these files, or pack the split again"
        )
    if manifest.bands:
        _check_sizes(manifest, max(spec.size for spec in specs))


def _check_sizes(manifest: Manifest, largest: int) -> None:
    """Raises ShardError for a stamp smaller than the largest view: it would stop the run wherever it comes."""
    index = manifest.index()
    smaller = np.flatnonzero(np.minimum(index["width"], index["height"]) < largest)
    if len(smaller):
        width, height = index[smaller[0]][["width", "height"]]
        raise ShardError(
            f"{manifest.member_name(int(smaller[0]))} is {width} x {height} px, smaller than a view of {largest} px"
            f" ({len(smaller)} of {len(index)} stamps are); lower views.*.size, or pack larger stamps"
        )


def _plain(specs: Sequence[ViewSpec]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(spec) for spec in specs]


def _fingerprint(**what: object) -> str:
    return hashlib.sha256(json.dumps({"version": FORMAT_VERSION, **what}, sort_keys=True).encode()).hexdigest()


_Step = tuple[int, int, Order]  # global step, epoch, rows of this rank
_Reading = tuple[int, int, Order, list[Future[list[bytes | ShardError]]]]


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


class _Renderer:
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
    ) -> None:
        self._manifest, self._specs, self._seed, self._depth, self._device = manifest, specs, seed, depth, device
        self._replace = replace
        self.bad_samples: dict[int, str] = {}
        self._index = manifest.index()
        self._backend: Backend = make(
            backend,
            specs,
            batch_size,
            device=device,
            threads=threads or available_cores(),
            output=output,
            depth=depth,
            bands=manifest.bands,
        )
        self._reader = Reader(manifest, _READ_THREADS)
        self._in_backend: deque[_Pending] = deque()
        # Collected out of turn, because a batch before them has to be rendered again.
        self._collected: deque[tuple[_Pending, list[Tensor] | DecodeError]] = deque()

    def batches(self, plan: Iterable[_Step]) -> Iterator[Batch]:
        self._discard()
        for step, epoch, rows, reading in self._read_ahead(plan):
            images = [image for part in reading for image in part.result()]
            self._submit(self._pending(step, epoch, rows, images))
            if len(self._in_backend) + len(self._collected) == self._depth:
                yield self._collect()
        while self._in_backend or self._collected:
            yield self._collect()

    def close(self) -> None:
        self._reader.close()
        self._backend.close()

    def _read_ahead(self, plan: Iterable[_Step]) -> Iterator[_Reading]:
        started: deque[_Reading] = deque()
        for step, epoch, rows in plan:
            started.append((step, epoch, rows, self._reader.request(rows)))
            if len(started) > self._depth:
                yield started.popleft()
        yield from started

    def _pending(self, step: int, epoch: int, rows: Order, images: Sequence[bytes | ShardError]) -> _Pending:
        """The batch to render, with replacements for samples that could not be read."""
        faults = {i: str(image) for i, image in enumerate(images) if isinstance(image, ShardError)}
        files = (
            [b"" if isinstance(image, ShardError) else image for image in images] if self._replace else whole(images)
        )
        pending = _Pending(step, epoch, rows, rows.copy(), files, {}, [])
        self._replace_samples(pending, faults)
        return pending

    def _submit(self, pending: _Pending) -> None:
        rows, epoch = pending.rows, pending.epoch
        entries = self._index[rows]
        draws = [
            draw_view(spec, view, self._seed, epoch, rows, entries["width"], entries["height"])
            for view, spec in flatten(self._specs)
        ]
        self._in_backend.append(pending)
        self._backend.submit(Job(pending.images, draws, _Names(self._manifest, rows)))

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
            self.bad_samples[int(pending.rows[i])] = fault
            attempt = pending.attempts.get(i, 0)
            if attempt == ATTEMPTS:
                raise ShardError(
                    f"{ATTEMPTS} samples that should have replaced a bad one are bad too, the last: {fault}"
                )
            pending.attempts[i] = attempt + 1
            planned = int(pending.planned[i])
            row = replacement(self._seed, pending.epoch, planned, attempt, self._manifest.num_samples)
            pending.rows[i] = row
            ((image,),) = [part.result() for part in self._reader.request(np.array([row]))]
            if isinstance(image, ShardError):
                waiting[i] = str(image)
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

    def __init__(self, manifest: Manifest, rows: Order) -> None:
        self._manifest, self._rows = manifest, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return _Names(self._manifest, self._rows[i])
        return self._manifest.member_name(int(self._rows[i]))


def _read_all(renderer: _Renderer, plan: Iterable[_Step]) -> Iterator[Batch]:
    stream = _Stream(renderer.batches(plan))
    try:
        yield from stream
    finally:
        stream.close()
        renderer.close()


class _Stream(Iterator[Batch]):
    """Runs an iterator of batches in a thread, one batch ahead of the consumer."""

    def __init__(self, source: Iterator[Batch]) -> None:
        self._made: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._wanted = threading.Semaphore(0)
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(source,), name="fastssl-loader", daemon=True)
        self._thread.start()

    def __next__(self) -> Batch:
        if self._closed:
            raise StopIteration
        made = self._made.get()
        if isinstance(made, BaseException):
            self._closed = True
            raise made
        self._wanted.release()
        return made

    def close(self) -> None:
        self._closed = True
        self._wanted.release()
        if self._thread is not threading.current_thread():  # the garbage collector may run this in any thread
            self._thread.join()

    def _run(self, source: Iterator[Batch]) -> None:
        try:
            for batch in source:
                self._made.put(batch)
                self._wanted.acquire()
                if self._closed:
                    break
            self._made.put(StopIteration())
        except BaseException as error:  # raised again in the consumer, whatever it is
            self._made.put(error)
