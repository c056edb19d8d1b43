"""Bytes of samples by positioned reads, checked against the index, with read-ahead by threads.

No memory mapping: a shard that is truncated while mapped ends the process by a signal, without a message.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from shard_tools.manifest import Manifest, ShardError

_MAX_OPEN = 512  # descriptors; the usual soft limit of a process is 1024
_TASK_ROWS = 16  # samples a task, to spread the cost of a task over small images


class Reader:
    """Reads samples of one split. `threads` bounds the reads in flight, which hide the latency of network storage."""

    def __init__(self, manifest: Manifest, threads: int = 8) -> None:
        self._manifest = manifest
        self._index = manifest.index()
        self._descriptors = _Descriptors(manifest)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastssl-read")

    def request(self, rows: npt.NDArray[np.int64]) -> list[Future[list[bytes | ShardError]]]:
        """Start reading samples; the results, joined in order, are the image files of `rows` in their order.

        In the place of one that cannot be read, or whose bytes are not those packed, is a ShardError that names shard
        and member.
        """
        return [self._pool.submit(self._read, rows[i : i + _TASK_ROWS]) for i in range(0, len(rows), _TASK_ROWS)]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._descriptors.close()

    def _read(self, rows: npt.NDArray[np.int64]) -> list[bytes | ShardError]:
        entries = self._index[rows]
        fields = (entries[name].tolist() for name in ("shard", "offset", "size", "crc32"))
        return [self._read_one(*entry) for entry in zip(rows.tolist(), *fields)]

    def _read_one(self, row: int, shard: int, offset: int, size: int, crc32: int) -> bytes | ShardError:
        try:
            with self._descriptors.opened(shard) as descriptor:
                payload = _read_exactly(descriptor, size, offset)
        except OSError as error:
            return self._fault(row, f"cannot be read ({error.strerror})")
        if len(payload) != size:
            return self._fault(row, f"ends after {len(payload)} of {size} bytes, the shard was cut")
        if zlib.crc32(payload) != crc32:
            return self._fault(row, "has other bytes than were packed (its crc32 differs)")
        return payload

    def _fault(self, row: int, what: str) -> ShardError:
        where, folder = self._manifest.member_name(row), self._manifest.root
        return ShardError(
            f"{where} {what}; restore that shard, and run `shard_tools verify --full {folder}` for others"
        )


def whole(images: Iterable[bytes | ShardError]) -> list[bytes]:
    """The image files, if all could be read. Raises the first ShardError."""
    files = []
    for image in images:
        if isinstance(image, ShardError):
            raise image
        files.append(image)
    return files


def _read_exactly(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes, or fewer at the end of the file; one read may return less than asked for."""
    payload = os.pread(descriptor, size, offset)
    while len(payload) < size and (more := os.pread(descriptor, size - len(payload), offset + len(payload))):
        payload += more
    return payload


class _Descriptors:
    """Open shards, at most _MAX_OPEN and those in use; the longest unused is closed first."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()  # shard -> descriptor
        self._users: dict[int, int] = {}  # shard -> reads in flight; a descriptor in use must not be closed

    @contextmanager
    def opened(self, shard: int) -> Iterator[int]:
        descriptor = self._acquire(shard)
        try:
            yield descriptor
        finally:
            with self._lock:
                self._users[shard] -= 1

    def close(self) -> None:
        with self._lock:
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _acquire(self, shard: int) -> int:
        with self._lock:
            if shard not in self._open:
                self._make_room()
                self._open[shard] = os.open(self._manifest.shard_path(shard), os.O_RDONLY | os.O_CLOEXEC)
            self._open.move_to_end(shard)
            self._users[shard] = self._users.get(shard, 0) + 1
            return self._open[shard]

    def _make_room(self) -> None:
        surplus = max(0, len(self._open) - _MAX_OPEN + 1)
        for shard in [shard for shard in self._open if not self._users[shard]][:surplus]:
            os.close(self._open.pop(shard))
