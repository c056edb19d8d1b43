"""Fetches the shards that come next into the cache, in the order of the epoch, before the reads need them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from shard_tools.cache import ShardCache
from shard_tools.manifest import ShardError

_DOWNLOADS = 4  # at once: one connection to an object store carries less than a disk

Stretch = tuple[int, int]  # a place in the endless order of samples, and a shard


class ReadAhead:
    """Threads that download.

    upcoming    (place, shard): the shard is fetched, after those before it, once the reads have come to `place`
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
        while (shard := self._take()) is not None:
            with contextlib.suppress(ShardError):
                self._cache.fetch(shard, wait=False)

    def _take(self) -> int | None:
        """The next shard, as soon as it may be fetched; None at the end."""
        with self._moved:
            self._moved.wait_for(lambda: self._closed or self._next is None or self._next[0] <= self._reached)
            if self._closed or self._next is None:
                return None
            shard = self._next[1]
            self._next = next(self._upcoming, None)
            return shard
