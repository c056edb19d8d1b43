"""Copies of remote files on a local disk: whole, checked by their sha256, and never more than a limit in all.

    CACHE/                              locked while room is made
    CACHE/<split>-<digest>/index.npy    and labels.npy: kept, and not counted
    CACHE/<split>-<digest>/*.tar        shards; the modification time says when one was last used
    CACHE/<split>-<digest>/*.partial    a download, locked by who makes it, and counted in full from its start

Any number of processes and threads may share it: one of them downloads a shard, the others wait for it. Locks are the
kernel's (flock), so none outlives its process. A shard is evicted only while nobody holds it by `opened`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

from shard_tools.disk import full_disk_explained, locked, partial_path
from shard_tools.manifest import Damaged, Manifest, ShardError, sha256_of
from shard_tools.remote import Access, RemoteFolder

_READ_BYTES = 2**20
_PAUSE_S = 0.05  # between looks at what another process holds
_ROOM_TRIES = 12_000  # ten minutes: what stands in the way are downloads of others, which end
_OTHER_FOLDER = "choose another folder with data.remote.cache or FASTSSL_CACHE"
_DOWNLOADS = 2  # of a file whose sha256 differs: once more, in case the network changed it


def cache_folder(access: Access) -> Path:
    """Where copies are kept. Raises ShardError if it cannot be made."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(access.cache or os.environ.get("FASTSSL_CACHE") or f"{caches}/fastssl").expanduser()
    with full_disk_explained(folder, _OTHER_FOLDER):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def mirror(access: Access, split: str, digest: str) -> Path:
    """The folder of copies of one split: found by its content, so that all addresses of the same data share it."""
    return cache_folder(access) / f"{split}-{digest[:16]}"


def fetch_file(remote: RemoteFolder, path: Path, most: int, sha256: str) -> None:
    """Put a remote file of `most` bytes at most at `path`, unless it is there. Raises ShardError for another sha256."""
    with full_disk_explained(path.parent, _OTHER_FOLDER):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file() and sha256_of(path) == sha256:
            return
        with _partial(path) as descriptor:
            if path.is_file() and sha256_of(path) == sha256:  # by another process, while this one waited
                return
            if (num_bytes := remote.size()) > most:
                raise OtherBytes(f"{remote} has {num_bytes:,} bytes, more than its manifest allows; upload it again")
            _download(remote, path, descriptor, num_bytes, sha256)


class ShardCache:
    """The shards of one remote split on the local disk.

    `stopping` ends downloads early, for close().
    """

    def __init__(self, manifest: Manifest, stopping: threading.Event | None = None) -> None:
        assert manifest.remote is not None
        self._manifest, self._remote = manifest, manifest.remote
        self._limit = int(manifest.remote.access.cache_gb * 1e9)
        self._stopping = stopping or threading.Event()
        self._checking = threading.Lock()
        self._checked: set[int] = set()  # shards whose sha256 this process has seen to be right
        self._refused: dict[int, str] = {}  # shards that are not what was packed, so that nobody asks for them again

    @contextlib.contextmanager
    def opened(self, shard: int) -> Iterator[int]:
        """A descriptor of the shard's copy, which is not evicted meanwhile. Raises ShardError."""
        descriptor = self._open(shard)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def path(self, shard: int) -> Path:
        """The shard's copy, fetched if need be; one that was there is not checked again, and may be evicted."""
        self.fetch(shard)
        return self._path(shard)

    def touch(self, shards: Iterable[int]) -> None:
        """The copies of these are in use: others are to make room before them."""
        for shard in shards:
            _touch(self._path(shard))

    def fetch(self, shard: int, *, wait: bool = True) -> None:
        """Have a copy of the shard, unless another process is at it and `wait` is not set. Raises ShardError."""
        entry, path = self._manifest.shards[shard], self._path(shard)
        if _touch(path):
            return
        if shard in self._refused:
            raise OtherBytes(self._refused[shard])
        if entry.num_bytes > self._limit:
            raise ShardError(
                f"{path.name} has {entry.num_bytes:,} bytes, more than data.remote.cache_gb={self._limit / 1e9:g};"
                " raise it, or use data.remote.read=ranges"
            )
        with (
            full_disk_explained(path.parent, f"lower data.remote.cache_gb, or {_OTHER_FOLDER}"),
            contextlib.suppress(BlockingIOError),
            _partial(path, wait, self._stopping) as descriptor,
        ):
            if _touch(path):  # by another process, while this one waited
                return
            self._reserve(descriptor, entry.num_bytes)
            try:
                _download(self._remote / entry.name, path, descriptor, entry.num_bytes, entry.sha256, self._stopping)
            except OtherBytes as error:
                self._refused[shard] = str(error)
                raise
            self._checked.add(shard)

    def _path(self, shard: int) -> Path:
        return self._manifest.root / self._manifest.shards[shard].name

    def _open(self, shard: int) -> int:
        while not self._stopping.is_set():
            try:
                descriptor = os.open(self._path(shard), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self.fetch(shard)
                continue
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if os.fstat(descriptor).st_nlink and self._is_right(shard, descriptor):
                os.utime(descriptor)
                return descriptor
            os.close(descriptor)  # evicted before it was locked, or damaged since it was downloaded
        raise ShardError(f"the cache of {self._remote} was closed")

    def _is_right(self, shard: int, descriptor: int) -> bool:
        """Whether an earlier process left what was packed; a file that is not is removed."""
        with self._checking:
            if shard in self._checked:
                return True
            digest, offset = hashlib.sha256(), 0
            while piece := os.pread(descriptor, _READ_BYTES, offset):
                digest.update(piece)
                offset += len(piece)
            if digest.hexdigest() != self._manifest.shards[shard].sha256:
                self._path(shard).unlink(missing_ok=True)
                return False
            self._checked.add(shard)
            return True

    def _reserve(self, descriptor: int, num_bytes: int) -> None:
        """Make room by removing the longest unused shards, and take it. Raises ShardError if none becomes free."""
        folder = self._manifest.root.parent
        for _ in range(_ROOM_TRIES):
            with locked(folder, wait=True):
                if _make_room(folder, self._limit - num_bytes):
                    os.truncate(descriptor, num_bytes)
                    return
            if self._stopping.wait(_PAUSE_S):
                break
        raise ShardError(
            f"{folder} has no room for {num_bytes:,} bytes within data.remote.cache_gb={self._limit / 1e9:g}, for"
            " everything in it is in use; raise it, or give each run a folder of its own"
        )


class OtherBytes(Damaged):
    """A download that is not what the manifest says, twice."""


@contextlib.contextmanager
def _partial(path: Path, wait: bool = True, stopping: threading.Event | None = None) -> Iterator[int]:
    """The locked, empty partial file of `path`; gone at the end, unless it was renamed.

    Raises BlockingIOError if another process has it, and `wait` is not set or `stopping` is.
    """
    partial, stopping = partial_path(path), stopping or threading.Event()
    while True:
        descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            if not _try_lock(descriptor, fcntl.LOCK_EX):
                if not wait or stopping.wait(_PAUSE_S):
                    raise BlockingIOError(f"{partial} is locked")
                continue
            if not _is_at(partial, descriptor):  # its owner renamed or removed it while we waited
                continue
            try:
                os.truncate(descriptor, 0)
                yield descriptor
            finally:
                if _is_at(partial, descriptor):
                    partial.unlink()
            return
        finally:
            os.close(descriptor)


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _touch(path: Path) -> bool:
    """Whether `path` is there; it is not the longest unused any more."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _download(
    remote: RemoteFolder,
    path: Path,
    descriptor: int,
    num_bytes: int,
    sha256: str,
    stopping: threading.Event | None = None,
) -> None:
    """Fill the partial file of `path` and rename it, if its bytes are those of the manifest. Raises ShardError."""
    for _ in range(_DOWNLOADS):
        digest, offset = hashlib.sha256(), 0
        for piece in remote.pieces(num_bytes, stopping):
            if stopping and stopping.is_set():
                raise ShardError(f"the download of {remote} was ended")
            digest.update(piece)
            if offset + len(piece) > num_bytes:
                break
            os.pwrite(descriptor, piece, offset)
            offset += len(piece)
        if digest.hexdigest() == sha256:
            os.replace(partial_path(path), path)
            return
    raise OtherBytes(
        f"{remote} is not the file that was packed (its sha256 differs from the manifest's); upload it again"
    )


def _make_room(folder: Path, allowed: int) -> bool:
    """Whether all shards below `folder` now take `allowed` bytes at most; the longest unused are removed for it."""
    found = []
    for path in folder.glob("*/*.tar*"):
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= allowed:
            break
        if _remove_unused(path):
            total -= size
    return total <= allowed


def _remove_unused(path: Path) -> bool:
    """Remove a shard, or the rest of a download whose process died, unless somebody holds it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        # What is not at its path any more was renamed or replaced since it was listed; the next look will show it.
        if not _try_lock(descriptor, fcntl.LOCK_EX) or not _is_at(path, descriptor):
            return False
        path.unlink()
        return True
    finally:
        os.close(descriptor)
