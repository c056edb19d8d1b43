"""Writing that survives a kill: beside the target, flushed, renamed; a full disk is a sentence, not a traceback."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from shard_tools import exit_codes
from shard_tools.manifest import ShardError

PARTIAL = ".partial"  # suffix of a file that is still being written


class DiskFull(ShardError):
    """The disk, a quota or a size limit stopped a write; what was complete before is kept."""

    exit_code = exit_codes.DISK_FULL


class Locked(ShardError):
    """Another process works on the same folder."""

    exit_code = exit_codes.LOCKED


def write_file(path: Path, content: bytes) -> None:
    """Put `content` at `path`, all or nothing, durable when this returns."""
    partial = partial_path(path)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    put_in_place(path)


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def put_in_place(path: Path, partial: Path | None = None) -> None:
    """Rename the flushed `partial` (by default the partial file of `path`) to `path`, durably."""
    os.replace(partial or partial_path(path), path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Make a file's content durable, whoever wrote it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no such thing for folders
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold `folder` alone; the kernel lets go of it when the process ends, however it ends.

    Raises Locked if another process holds it and `wait` is not set.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder, wait)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise Locked(f"another process is writing to {folder}; wait for it, or choose another folder") from None
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise  # NFS cannot lock folders: there, two packs into one split are the user's to avoid


@contextlib.contextmanager
def full_disk_explained(folder: Path, remedy: str) -> Iterator[None]:
    """Turn the errors of a full disk inside into DiskFull, and the other errors of writing into ShardError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DiskFull(f"no space left for {folder} ({error.strerror}); {remedy}") from None
        raise ShardError(f"{error.filename or folder} cannot be written ({error.strerror}); {remedy}") from None
