"""Shards to batches: order, read, draw, render, in one background thread that stays a few batches ahead.

The batch of a step is a pure function of (data, views, batch size, seed, step): the number of ranks, threads,
prefetching and the steps made before do not matter. So the number of the next step is all the state that a loader has.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import itertools
import json
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.order import Order, order, rows_for_step, shard_order, windowed_order
from pipelines.philox import check_seed
from pipelines.read_ahead import ReadAhead, Stretch
from pipelines.renderer import Batch as Batch
from pipelines.renderer import Renderer, Step
from pipelines.views import ViewSpec
from pipelines.views import normalize as normalize  # the other half of a uint8 batch, for the training side
from shard_tools.manifest import Damaged, Manifest, ShardError

ORDERS = ("global", "window")
WINDOW = 16
_SHARDS_AHEAD = 4  # where samples are read once, in order
FORMAT_VERSION = 1  # of what a step means; raised when the same settings would give other batches


class Loader:
    """Batches of one split for one rank, without end.

    batch_size  the global batch; each rank gets batch_size / world of it
    threads     for the backend; 0 takes the cores of this process divided by the ranks on this host
    prefetch    batches that are being made while the consumer works
    output      "uint8": raw pixels, for `normalize`; "float32" or "float16": normalised. Stamps are always normalised
    order       "global", or "window" for network storage (see order.py)
    window      shards that order="window" shuffles together
    decode      "full"; or "scaled", which is faster and less faithful (see backends/native.py)
    on_bad      "fail" at a sample that cannot be read or decoded, or "replace" it (see bad_samples.py); its neighbours
                keep their views

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
        window: int = WINDOW,
        on_bad: str = "fail",
        decode: str = "full",
    ) -> None:
        _check(manifest, specs, threads, prefetch)
        check_seed(seed)
        check_batch_size(batch_size, world, manifest.num_samples, f"{manifest.split} in {manifest.place}")
        if order not in ORDERS:
            raise ValueError(f"loader.order is {order!r}, but must be one of {', '.join(ORDERS)}")
        if window < 1:
            raise ValueError(f"loader.window is {window}, but must be 1 or more")
        _check_cache(manifest, order, window)
        if on_bad not in ("fail", "replace"):
            raise ValueError(f"loader.on_bad is {on_bad!r}, but must be fail or replace")
        self.steps_per_epoch = manifest.num_samples // batch_size
        self.dropped_per_epoch = manifest.num_samples % batch_size
        self.fingerprint = _fingerprint(
            manifest=manifest.digest,
            specs=_plain(specs),
            batch_size=batch_size,
            seed=seed,
            order=order,
            **({"window": window} if order == "window" and window != WINDOW else {}),
        )
        self._manifest = manifest
        self._batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world
        self._order, self._window = order, window
        self._renderer = Renderer(
            manifest,
            specs,
            batch_size=batch_size // world,
            seed=seed,
            backend=backend,
            device=device,
            threads=threads or available_cores(),
            depth=prefetch,
            output=output,
            replace=on_bad == "replace",
            decode=decode,
        )
        self._stream: _Stream | None = None
        self._ahead: ReadAhead | None = None
        self._orders = ThreadPoolExecutor(1, "fastssl-order")

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """The batches of steps start_step, start_step + 1, ... One iterator at a time: a new one ends the one before.

        Errors of the background thread are raised here: ShardError for bytes, DecodeError for an image.
        """
        self._end_stream()
        if cache := self._renderer.reader.cache:
            start = self._place(start_step)
            self._ahead = ReadAhead(cache, self._upcoming(start_step // self.steps_per_epoch, start), start)
        self._stream = _Stream(self._renderer.batches(self._plan(start_step)))
        return self._stream

    def close(self) -> None:
        """Ends the threads; harmless when repeated.

        Waits for what a server has been asked for, and for an epoch's order that is being made.
        """
        self._renderer.reader.stop()
        self._end_stream()
        self._orders.shutdown()
        self._renderer.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _end_stream(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
        if self._stream is not None:
            self._stream.close()

    def _plan(self, start_step: int) -> Iterator[Step]:
        """(step, epoch, rows) from `start_step` on, without end.

        The order of the next epoch, seconds of work for millions of samples, is made in a thread of its own during the
        second half of this one, so that a short run does without it.
        """
        epoch, first = divmod(start_step, self.steps_per_epoch)
        permutation = self._permutation(epoch)
        while True:
            for step in range(first, self.steps_per_epoch):
                if step == max(first, self.steps_per_epoch // 2):
                    following = self._orders.submit(self._permutation, epoch + 1)
                rows = rows_for_step(permutation, step, self._batch_size, self._rank, self._world)
                number = epoch * self.steps_per_epoch + step
                if self._ahead is not None:
                    self._ahead.move_to(self._place(number))
                yield number, epoch, rows
            permutation = following.result()
            epoch, first = epoch + 1, 0

    def _permutation(self, epoch: int) -> Order:
        if self._order == "window":
            sizes = [shard.num_samples for shard in self._manifest.shards]
            return windowed_order(sizes, self._seed, epoch, self._window)
        return order(self._manifest.num_samples, self._seed, epoch)

    def _place(self, step: int) -> int:
        """The samples before `step`, over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch * self._manifest.num_samples + within * self._batch_size

    def _upcoming(self, epoch: int, start: int) -> Iterator[Stretch]:
        """Every shard of each epoch, to be fetched in the first half of the window before its own."""
        sizes = [shard.num_samples for shard in self._manifest.shards]
        if self._order == "global":  # its first batches touch every shard
            yield from (Stretch(0, shard) for shard in range(len(sizes)))
            return
        opens, open_before = epoch * self._manifest.num_samples, 0
        window_before: list[int] = []
        for number in itertools.count(epoch):
            shards = shard_order(len(sizes), self._seed, number).tolist()
            for first in range(0, len(shards), self._window):
                window = shards[first : first + self._window]
                closes = opens + sum(sizes[shard] for shard in window)
                if closes > start:
                    pace = (opens - open_before) / (2 * len(window))
                    for i, shard in enumerate(window):
                        yield Stretch(open_before + round(i * pace), shard, (*window_before, *window[:i]))
                opens, open_before, window_before = closes, opens, window


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
    renderer = Renderer(
        manifest,
        specs,
        batch_size=share,
        seed=seed,
        backend=backend,
        device=device,
        threads=threads or available_cores(),
        depth=2,
        output=output,
    )
    return _read_all(renderer, mine, share, epoch, manifest.index()["shard"])


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
        raise Damaged(
            f"{manifest.split} cannot be used: {'; '.join(faults)}. Restore these files, or pack the split again"
        )
    if manifest.bands:
        _check_sizes(manifest, max(spec.size for spec in specs))


def _check_cache(manifest: Manifest, order: str, window: int) -> None:
    """Raises ValueError if the cache would fetch the same shards again and again within an epoch."""
    if manifest.remote is None or manifest.remote.access.read != "shards":
        return
    sizes = sorted((shard.num_bytes for shard in manifest.shards), reverse=True)
    needed = sum(sizes if order == "global" else sizes[: 2 * window + 1])  # one window is read, the next one fetched
    if needed > manifest.remote.access.cache_gb * 1e9:
        other = "loader.order=window" if order == "global" else "a lower loader.window"
        raise ValueError(
            f"data.remote.cache_gb is {manifest.remote.access.cache_gb:g}, but loader.order={order} needs"
            f" {needed / 1e9:.2f} GB of {manifest.place} at a time; raise it, use {other}, or data.remote.read=ranges"
        )


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


def _read_all(
    renderer: Renderer, rows: Order, share: int, epoch: int, shard_of: npt.NDArray[np.uint32]
) -> Iterator[Batch]:
    """The batches of `rows`, `share` at a time; shards of a remote split are fetched _SHARDS_AHEAD."""
    cache = renderer.reader.cache
    ahead = ReadAhead(cache, _by_first_use(shard_of[rows]), 0) if cache else None

    def plan() -> Iterator[Step]:
        for step, first in enumerate(range(0, len(rows), share)):
            if ahead is not None:
                ahead.move_to(first)
            yield step, epoch, rows[first : first + share]

    stream = _Stream(renderer.batches(plan()))
    try:
        yield from stream
    finally:
        renderer.reader.stop()
        if ahead is not None:
            ahead.close()
        stream.close()
        renderer.close()


def _by_first_use(shards: npt.NDArray[np.uint32]) -> Iterator[Stretch]:
    """The shards of samples that are read in this order, each due when the one _SHARDS_AHEAD of it is begun."""
    found, first = np.unique(shards, return_index=True)
    order = np.argsort(first)
    due = [0] * _SHARDS_AHEAD + first[order].tolist()
    yield from map(Stretch, due, found[order].tolist())


class _Stream(Iterator[Batch]):
    """Runs an iterator of batches in a thread, one batch ahead of the consumer."""

    def __init__(self, source: Iterator[Batch]) -> None:
        self._made: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._wanted = threading.Semaphore(0)
        self._closed = False
        self._thread = threading.Thread(target=self._run, args=(source,), name="fastssl-loader", daemon=True)
        self._thread.start()
        # A thread that comes back from torch's C++ while the interpreter is being taken down would abort the process.
        atexit.register(self.close)

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
        atexit.unregister(self.close)
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
