"""Work spread over processes with the results in order, and no process left behind when the parent is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from shard_tools.manifest import ShardError

T = TypeVar("T")
R = TypeVar("R")

WORKER_DIED = (
    "a worker process died, for want of memory or by a file that crashes its decoder; run the same command with"
    " --workers 1 to continue and to see which"
)
_CHUNKS_AHEAD = 3  # per worker: enough to keep it busy, little enough to hold in memory


def in_order(work: Callable[[T], R], items: Iterable[T], workers: int, chunk: int = 16) -> Generator[R, None, None]:
    """`map(work, items)` on `workers` processes (1: in this one); `work` and the items must be picklable.

    Raises ShardError if a worker dies, for want of memory or by a file that crashes its decoder.
    """
    if workers <= 1:
        yield from map(work, items)
        return
    pending: deque[Future[list[R]]] = deque()
    try:
        with process_pool(workers) as pool:
            for piece in _chunks(iter(items), chunk):
                pending.append(pool.submit(_work_on, work, piece))
                if len(pending) >= _CHUNKS_AHEAD * workers:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    except BrokenProcessPool:
        raise ShardError(WORKER_DIED) from None


@contextmanager
def process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, and that leave Ctrl-C to it; what waits is cancelled at the end."""
    # spawn: forked children would inherit the threads' locks of whoever imported us (torch, rich)
    pool = _Pool(workers, multiprocessing.get_context("spawn"), _start_worker, (os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Pool(ProcessPoolExecutor):
    def submit(self, *args: Any, **kwargs: Any) -> Future:
        """As its parent's, which starts the processes: they inherit that Ctrl-C is held, also while they import."""
        held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return super().submit(*args, **kwargs)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _chunks(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while chunk := list(islice(items, size)):
        yield chunk


def _work_on(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    return [work(item) for item in items]


def _start_worker(parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
