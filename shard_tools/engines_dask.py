"""Packing on the machines of a dask.distributed cluster that share SRC and DST (a network file system).

Only the public Client API is used. Dask runs the tasks of a worker that died again on another one; as every task writes
to files of its own name, a worker that was given up but lives on does no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy
import PIL
from distributed import Client, KilledWorker, get_worker

from shard_tools.engines import Engine, ahead
from shard_tools.manifest import ShardError

T = TypeVar("T")
R = TypeVar("R")

_TIMEOUT_S = 15
_AHEAD = 2  # tasks under way per worker: one that runs, one that waits

# Pillow decides which files are bad, and the bytes of those that are shrunk.
VERSIONS = (f"Pillow {PIL.__version__}", f"numpy {numpy.__version__.partition('.')[0]}")


class Cluster:
    """Workers of one thread each; those that join later take part."""

    is_remote = True

    def __init__(self, client: Client):
        self._client = client

    @property
    def width(self) -> int:
        return max(1, sum(self._client.nthreads().values()))

    def in_order(
        self, work: Callable[[T], R], tasks: Iterable[T], idle: Callable[[T], bool] | None = None
    ) -> Generator[R, None, None]:
        call = partial(_on_worker, VERSIONS, work)
        try:
            yield from ahead(lambda task: self._client.submit(call, task, pure=False), tasks, _AHEAD * self.width)
        except KilledWorker as error:
            raise ShardError(
                f"several workers died of the same task ({str(error).splitlines()[0]}), for want of memory or by a file"
                " that crashes its decoder; pack with --engine local --workers 1 to continue and to see which"
            ) from None
        except CancelledError:
            raise ShardError(
                "the dask scheduler is gone; complete shards are kept: start it and run the same command again"
            ) from None


@contextmanager
def cluster(scheduler: str) -> Iterator[Engine]:
    """Connect to the scheduler at the address `scheduler`, such as tcp://10.0.0.1:8786.

    Raises ShardError where none answers, it has no workers, or they cannot do this work.
    """
    try:
        client = Client(scheduler, timeout=_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ShardError(
            f"no dask scheduler answers at {scheduler} ({type(error).__name__}); start one with `dask scheduler`, or"
            " check --scheduler"
        ) from None
    with client:
        if not client.nthreads():
            raise ShardError(
                f"the dask scheduler at {scheduler} has no workers; start some with `dask worker {scheduler}"
                " --nthreads 1 --nworkers N`"
            )
        try:
            client.submit(_on_worker, VERSIONS, str, "", pure=False).result(_TIMEOUT_S)
        except ShardError:
            raise
        except Exception as error:  # whatever an environment without us says: import, unpickling, version
            raise ShardError(
                f"the workers of {scheduler} cannot run shard_tools ({type(error).__name__}: {error}); install the same"
                " fastssl-train there as here"
            ) from None
        yield Cluster(client)


def _on_worker(versions: tuple[str, ...], work: Callable[[T], R], task: T) -> R:
    """On a worker: the task, if this worker gives the bytes that every other does."""
    worker = get_worker()
    if versions != VERSIONS:
        raise ShardError(
            f"the worker {worker.address} has {', '.join(VERSIONS)}, but this process {', '.join(versions)}; install"
            " the same versions"
        )
    if worker.state.nthreads != 1:
        # what Python warns of is caught per process, and damaged EXIF is told by a warning of Pillow's
        raise ShardError(
            f"the worker {worker.address} runs {worker.state.nthreads} threads, but decoding needs a process each;"
            " start it with --nthreads 1 --nworkers N"
        )
    return work(task)
