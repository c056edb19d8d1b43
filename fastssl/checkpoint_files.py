"""The files of a checkpoint folder: written durably, sealed by SHA256SUMS, and never used before their hash is right.

What is read before a hash is known (SHA256SUMS), and what Python parses (meta.json), has at most 1 MiB. A name that is
not a regular file (a link, a folder, a pipe) is a fault and is not read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from shard_tools import exit_codes
from shard_tools.manifest import sha256_of, sha256_of_open

SUMS = "SHA256SUMS"
MAX_TEXT_BYTES = 1 << 20

_LINE = re.compile(rb"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]{0,63})")
_ZIP_END_BYTES = 22


class CheckpointError(ValueError):
    """A checkpoint that is not there, not whole, or of other data; the message says where and what to do."""


class DamagedError(CheckpointError):
    """Bytes that are not those that were written. `fault` says which."""

    exit_code = exit_codes.DAMAGED

    def __init__(self, message: str, fault: str) -> None:
        super().__init__(message)
        self.fault = fault

    @classmethod
    def of(cls, folder: Path, fault: str) -> DamagedError:
        return cls(f"checkpoint {folder} is damaged: {fault}; take another one of the same run", fault)


def write_tensors(path: Path, value: Any) -> None:
    """torch.save, durable when this returns. Raises OSError, with the path."""
    _write(path, lambda file: torch.save(value, file))


def write_text(path: Path, text: str) -> None:
    """Durable when this returns. Raises OSError, with the path."""
    _write(path, lambda file: file.write(text.encode()))


def seal(folder: Path, names: Iterable[str]) -> None:
    """Write SHA256SUMS of these files, read back from where they were written. Raises OSError; all must be there."""
    write_text(folder / SUMS, "".join(f"{sha256_of(folder / name)}  {name}\n" for name in sorted(names)))


def sealed_names(folder: Path) -> dict[str, str]:
    """SHA256SUMS as {name: sha256}. Raises DamagedError."""
    with _regular_file(folder, SUMS, MAX_TEXT_BYTES) as file:
        *lines, rest = file.read(MAX_TEXT_BYTES + 1).split(b"\n")
    if rest or not lines:
        raise DamagedError.of(folder, f"{SUMS} is cut")
    entries = [_LINE.fullmatch(line) for line in lines]
    sums = {entry[2].decode(): entry[1].decode() for entry in entries if entry}
    if len(sums) != len(lines):
        raise DamagedError.of(folder, f"{SUMS} is not a list of hashes and names, each name once")
    return sums


def verify(folder: Path, names: Collection[str]) -> None:
    """Raises DamagedError unless SHA256SUMS lists exactly `names`, and each has that hash."""
    sums = sealed_names(folder)
    for name in sorted(names):
        if name not in sums:
            raise DamagedError.of(folder, f"{SUMS} does not list {name}")
    for name in sums:
        if name not in names:
            raise DamagedError.of(folder, f"{SUMS} lists {name}, which is no part of it")
        with _opened(folder, name, sums[name]):
            pass


def read_tensors(folder: Path, name: str, device: torch.device) -> dict[str, Any]:
    """What `write_tensors` wrote, if its hash is right now; no Python object is made from it but plain containers.

    Raises DamagedError, or CheckpointError if the file is whole but holds something else.
    """
    with _opened(folder, name, sealed_names(folder).get(name)) as file:
        if not is_uncompressed(file):
            raise CheckpointError(f"{folder / name} is compressed, which fastssl never does; take one that it wrote")
        try:
            value = torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # of foreign bytes torch's reader makes errors of any kind
            raise CheckpointError(
                f"{folder / name} holds other things than plain tensors ({type(error).__name__}), which are not loaded "
                "because they can run code; take a checkpoint that fastssl wrote"
            ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{folder / name} holds no tensors by name; take a checkpoint that fastssl wrote")
    return value


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of at most 1 MiB, if its hash is right now. Raises DamagedError."""
    with _opened(folder, name, sealed_names(folder).get(name), MAX_TEXT_BYTES) as file:
        content = file.read(MAX_TEXT_BYTES)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DamagedError.of(folder, f"{name} is not a JSON object")
    return value


def is_uncompressed(file: BinaryIO) -> bool:
    """Whether unpacking a zip takes no more memory than it is large; true of all else. Leaves the file at its start."""
    try:
        members = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, OverflowError, ValueError):
        members = []  # no zip, or torch says what is wrong with it
    file.seek(0)
    size = os.fstat(file.fileno()).st_size
    return all(m.compress_type == zipfile.ZIP_STORED for m in members) and sum(m.file_size for m in members) <= size


def _ends_as_archive(file: BinaryIO) -> bool:
    """Whether the last bytes are those of a zip without a comment, as torch.save ends its files."""
    file.seek(max(0, os.fstat(file.fileno()).st_size - _ZIP_END_BYTES))
    end = file.read(_ZIP_END_BYTES)
    file.seek(0)
    return len(end) == _ZIP_END_BYTES and end.startswith(b"PK\5\6")


@contextlib.contextmanager
def _opened(folder: Path, name: str, digest: str | None, most: int | None = None) -> Iterator[BinaryIO]:
    """The file, at its start, once its bytes are known to have this sha256. Raises DamagedError."""
    if digest is None:
        raise DamagedError.of(folder, f"{SUMS} does not list {name}")
    with _regular_file(folder, name, most) as file:
        if name.endswith(".pt") and not _ends_as_archive(file):  # known at once, however large the file claims to be
            raise DamagedError.of(folder, f"{name} is cut, or nothing that torch.save writes")
        if sha256_of_open(file) != digest:
            raise DamagedError.of(folder, f"{name} does not have the sha256 that {SUMS} says")
        file.seek(0)
        yield file


@contextlib.contextmanager
def _regular_file(folder: Path, name: str, most: int | None) -> Iterator[BinaryIO]:
    """Whatever else has the name is not waited for (a pipe) and not followed (a link). `most` bytes are allowed."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DamagedError.of(folder, f"{name} is not a regular file")
            if most is not None and status.st_size > most:
                raise DamagedError.of(folder, f"{name} has {status.st_size:,} bytes, and may have {most:,}")
            with open(descriptor, "rb", closefd=False) as file:
                yield file
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        raise DamagedError.of(folder, f"{name} is missing") from None
    except OSError as error:  # a link (ELOOP), a disk that cannot be read, another user's file
        what = "is a symbolic link" if error.errno == errno.ELOOP else f"cannot be read ({error.strerror})"
        raise DamagedError.of(folder, f"{name} {what}") from None


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    try:
        with path.open("wb") as file:  # torch's own writer would not say that a disk is full
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:
        cause = _os_error_behind(error)
        if cause is None:
            raise
        cause.filename = cause.filename or str(path)
        raise cause from None


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """torch.save meets a failed write, wants to end its archive all the same, and raises what comes of that."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error
