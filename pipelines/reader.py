"""Bytes of samples by positioned reads, checked against the index, with read-ahead by threads.

No memory mapping: a shard that is truncated while mapped ends the process by a signal, without a message.
Shards behind a URL are read from copies in the cache, or by requests for the samples' bytes (see remote.py, cache.py).
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from shard_tools.cache import OtherBytes, ShardCache
from shard_tools.checksum import crc32
from shard_tools.manifest import Damaged, Manifest, ShardError
from shard_tools.remote import RemoteFolder

_MAX_OPEN = 512  # descriptors; the usual soft limit of a process is 1024
_TASK_ROWS = 16  # samples a task, to spread the cost of a task over small images
_REQUESTS = 32  # in flight, where samples are read by requests of their own
_MAX_GAP = 64 * 2**10  # bytes between two samples that are not worth a second request
_MAX_REQUEST = 8 * 2**20  # bytes of a request that joins several samples


class Part(Protocol):
    """Samples that are being read."""

    def result(self) -> list[bytes | ShardError]: ...


class Reader:
    """Reads samples of one split. `threads` bounds the reads in flight, which hide the latency of network storage.

    cache   of a remote split that is read in whole shards; None otherwise
    index   of the manifest, in memory
    """

    def __init__(self, manifest: Manifest, threads: int = 8) -> None:
        self._manifest = manifest
        self.index = manifest.index()
        self._stopping = threading.Event()
        remote = manifest.remote
        self.cache = ShardCache(manifest, self._stopping) if remote and remote.access.read == "shards" else None
        self._requests = remote if remote and not self.cache else None
        self._shards: _Shards = self.cache or _Descriptors(manifest)
        self._pool = ThreadPoolExecutor(_REQUESTS if self._requests else threads, thread_name_prefix="fastssl-read")

    def request(self, rows: npt.NDArray[np.int64]) -> Sequence[Part]:
        """Start reading samples; the results, joined in order, are the image files of `rows` in their order.

        In the place of one that cannot be read, or whose bytes are not those packed, is a ShardError that names shard
        and member. A result raises RemoteError where storage behind a URL fails, which is no fault of a sample.
        """
        if self._requests:
            stretches = neighbours(self.index[rows])
            reads = [self._pool.submit(self._read_stretch, self._requests, rows[places]) for places in stretches]
            return [_Stretches(len(rows), stretches, reads)]
        return [self._pool.submit(self._read, rows[i : i + _TASK_ROWS]) for i in range(0, len(rows), _TASK_ROWS)]

    def name(self, row: int) -> str:
        """`shard:member` of a sample, for messages."""
        return self._manifest.member_name(row, self.index[row])

    def stop(self) -> None:
        """No request is tried again: what is being read fails soon, and only close() may follow."""
        self._stopping.set()

    def close(self) -> None:
        self.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        if isinstance(self._shards, _Descriptors):
            self._shards.close()

    def _read(self, rows: npt.NDArray[np.int64]) -> list[bytes | ShardError]:
        entries = self.index[rows]
        fields = (entries[name].tolist() for name in ("shard", "offset", "size", "crc32"))
        return [self._read_one(*entry) for entry in zip(rows.tolist(), *fields)]

    def _read_one(self, row: int, shard: int, offset: int, size: int, checksum: int) -> bytes | ShardError:
        try:
            with self._shards.opened(shard) as descriptor:
                payload = _read_exactly(descriptor, size, offset)
        except OSError as error:
            return self._fault(row, f"cannot be read ({error.strerror})")
        except OtherBytes as error:
            return self._fault(row, f"cannot be read ({error})")
        return self._checked(row, payload, size, checksum)

    def _read_stretch(self, folder: RemoteFolder, rows: npt.NDArray[np.int64]) -> list[bytes | ShardError]:
        """One request for samples that follow each other in a shard."""
        entries = self.index[rows]
        first, last = int(entries["offset"][0]), int((entries["offset"] + entries["size"]).max())
        name = self._manifest.shards[int(entries["shard"][0])].name
        content = (folder / name).read(first, last - first, self._stopping)
        fields = (entries[name].tolist() for name in ("offset", "size", "crc32"))
        return [
            self._checked(row, content[offset - first : offset - first + size], size, checksum)
            for row, offset, size, checksum in zip(rows.tolist(), *fields)
        ]

    def _checked(self, row: int, payload: bytes, size: int, checksum: int) -> bytes | ShardError:
        if len(payload) != size:
            return self._fault(row, f"ends after {len(payload)} of {size} bytes, the shard was cut")
        if crc32(payload) != checksum:
            return self._fault(row, "has other bytes than were packed (its crc32 differs)")
        return payload

    def _fault(self, row: int, what: str) -> ShardError:
        where, folder = self.name(row), self._manifest.place
        return Damaged(f"{where} {what}; restore that shard, and run `shard_tools verify --full {folder}` for others")


def neighbours(entries: npt.NDArray[np.void]) -> list[npt.NDArray[np.int64]]:
    """Rows of the index as groups for one request each: places in `entries`, in the order of their offsets."""
    order = np.lexsort((entries["offset"], entries["shard"]))
    groups: list[list[int]] = []
    shard = first = end = -1
    for place, (its_shard, offset, size) in zip(order.tolist(), entries[order][["shard", "offset", "size"]].tolist()):
        near = groups and its_shard == shard and offset <= end + _MAX_GAP and offset + size <= first + _MAX_REQUEST
        if not near:
            groups.append([])
            shard, first, end = its_shard, offset, offset
        groups[-1].append(place)
        end = max(end, offset + size)
    return [np.array(group) for group in groups]


class _Stretches:
    """The reads of a batch by requests, put back into its order."""

    def __init__(
        self,
        count: int,
        stretches: Sequence[npt.NDArray[np.int64]],
        reads: Sequence[Future[list[bytes | ShardError]]],
    ) -> None:
        self._count, self._stretches, self._reads = count, stretches, reads

    def result(self) -> list[bytes | ShardError]:
        images: list[bytes | ShardError] = [b""] * self._count
        for places, read in zip(self._stretches, self._reads):
            for place, image in zip(places.tolist(), read.result()):
                images[place] = image
        return images


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


class _Shards(Protocol):
    def opened(self, shard: int) -> AbstractContextManager[int]: ...


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
        unused = (shard for shard in self._open if not self._users[shard])  # the first, as a rule: each read comes here
        for shard in list(islice(unused, surplus)):
            os.close(self._open.pop(shard))
