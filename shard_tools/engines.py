"""Where the work of a pack runs: in this process, in processes of this machine, or on a dask cluster."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

from shard_tools.manifest import ShardError
from shard_tools.workers import WORKER_DIED, process_pool

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # tasks under way per worker: one that runs, one that waits
_FLUSHING_THREADS = 4


class Engine(Protocol):
    """Runs tasks that read the source and write beside the shards; several `in_order` may interleave.

    width       tasks that run at once
    is_remote   tasks may run on machines that see other file systems than this one
    """

    @property
    def width(self) -> int: ...

    @property
    def is_remote(self) -> bool: ...

    def in_order(
        self, work: Callable[[T], R], tasks: Iterable[T], idle: Callable[[T], bool] | None = None
    ) -> Generator[R, None, None]:
        """`map(work, tasks)`, a few tasks ahead; `work` and the tasks must be picklable. Raises ShardError.

        idle    tells tasks that only wait for the disk, for which no core need be kept
        """
        ...


class Here:
    """One task at a time in this process; the disk is waited for beside it."""

    width = 1
    is_remote = False

    def __init__(self, threads: ThreadPoolExecutor):
        self._threads = threads

    def in_order(
        self, work: Callable[[T], R], tasks: Iterable[T], idle: Callable[[T], bool] | None = None
    ) -> Generator[R, None, None]:
        if idle is None:
            yield from map(work, tasks)
            return
        waits = idle

        def submit(task: T) -> Future[R]:
            return self._threads.submit(work, task) if waits(task) else _done(work(task))

        yield from ahead(submit, tasks, _AHEAD, keep=True)


def _done(result: R) -> Future[R]:
    future: Future[R] = Future()
    future.set_result(result)
    return future


class Processes:
    """Processes of this machine."""

    is_remote = False

    def __init__(self, pool: ProcessPoolExecutor, threads: ThreadPoolExecutor, width: int):
        self._pool, self._threads = pool, threads
        self.width = width

    def in_order(
        self, work: Callable[[T], R], tasks: Iterable[T], idle: Callable[[T], bool] | None = None
    ) -> Generator[R, None, None]:
        def submit(task: T) -> Future[R]:
            return (self._threads if idle and idle(task) else self._pool).submit(work, task)

        try:
            yield from ahead(submit, tasks, _AHEAD * self.width)
        except BrokenProcessPool:
            raise ShardError(WORKER_DIED) from None


@contextmanager
def local(workers: int) -> Iterator[Engine]:
    """`workers` processes, or this one if 1."""
    with ThreadPoolExecutor(_FLUSHING_THREADS) as threads:
        if workers == 1:
            yield Here(threads)
            return
        with process_pool(workers) as pool:
            yield Processes(pool, threads, workers)


def on_cluster(scheduler: str) -> AbstractContextManager[Engine]:
    """The dask.distributed cluster at `scheduler`; raises ShardError where dask is not installed."""
    try:
        from shard_tools.engines_dask import cluster
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("dask", "distributed"):
            raise
        raise ShardError(
            "--engine dask needs dask.distributed; install it with `pip install 'fastssl-train[cluster]'`"
        ) from None
    return cluster(scheduler)


def ahead(submit: Callable[[T], Any], tasks: Iterable[T], most: int, keep: bool = False) -> Generator[Any, None, None]:
    """Results in the order of `tasks`, of which fewer than `most` are under way; `submit` returns a future.

    keep    give the results of what is under way also where `tasks` raises, before its error
    """
    pending: deque[Any] = deque()
    try:
        for task in tasks:
            pending.append(submit(task))
            while pending and (len(pending) >= most or pending[0].done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except GeneratorExit:
        raise
    except BaseException:
        while keep and pending:
            yield pending.popleft().result()
        raise
    finally:
        for future in pending:
            future.cancel()
