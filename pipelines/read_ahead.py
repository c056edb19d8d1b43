"""Fetches the shards that come next into the cache, in the order of the epoch, before the reads need them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from shard_tools.cache import ShardCache
from shard_tools.manifest import ShardError

_DOWNLOADS = 4  # at once: one connection to an object store carries less than a disk


@dataclass(frozen=True)
class Stretch:
    """A shard to be fetched once the reads have come to `place` in the endless order of samples.

    beside  shards that are being read then, or wait for the same window, and must not make room for it
    """

    place: int
    shard: int
    beside: tuple[int, ...] = ()


class ReadAhead:
    """Threads that download.

    upcoming    in the order in which they are fetched
    reached     where the reads begin
    Errors are left to the reads, which come to the same shard and name what they need it for.
    """

    def __init__(self, cache: ShardCache, upcoming: Iterator[Stretch], reached: int) -> None:
        self._cache, self._upcoming, self._reached, self._closed = cache, upcoming, reached, False
        self._moved = threading.Condition()
        self._next = next(upcoming, None)
        self._threads = [
            threading.Thread(target=self._run, name="fastssl-read-ahead", daemon=True) for _ in range(_DOWNLOADS)
        ]
        for thread in self._threads:
            thread.start()

    def move_to(self, reached: int) -> None:
        """The reads have come to this place."""
        with self._moved:
            self._reached = reached
            self._moved.notify_all()

    def close(self) -> None:
        """Ends the threads; waits for a download that is under way, unless the cache was told to stop."""
        with self._moved:
            self._closed = True
            self._moved.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (stretch := self._take()) is not None:
            with contextlib.suppress(ShardError):
                self._cache.touch(stretch.beside)
                self._cache.fetch(stretch.shard, wait=False)

    def _take(self) -> Stretch | None:
        """The next one, as soon as it may be fetched; None at the end."""
        with self._moved:
            self._moved.wait_for(lambda: self._closed or self._next is None or self._next.place <= self._reached)
            if self._closed or self._next is None:
                return None
            taken, self._next = self._next, next(self._upcoming, None)
            return taken
