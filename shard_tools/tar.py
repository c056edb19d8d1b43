"""USTAR members, written so that the same input gives the same bytes, and a strict walk over the members of any tar.

The header is packed here and not by `tarfile`, whose output has changed between Python versions.
"""

from __future__ import annotations

import re
import struct
import tarfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from shard_tools.manifest import ShardError

BLOCK = 512
END = bytes(2 * BLOCK)

_MAX_RECORD_BYTES = 2**16  # of long names or pax headers; the longest path of Linux has 4,096
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_RECORDS = (*_LONG_NAMES, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
# Python before 3.11.10 takes the square of a run of digits to look for a pax header's encoding (CVE-2024-6232).
_LONG_NUMBER = re.compile(rb"\d{1024}")

_REST = 156  # where a header's numbers end: type, link, owner and prefix follow
# mode, uid, gid, size, mtime, checksum
_NUMBERS = re.compile(rb"(?:[0-7]{7}\0){3}([0-7]{11})[\0 ][0-7]{11}[\0 ]([0-7]{6})\0 ")
_DEVICES = re.compile(rb"(?:[0-7]{7}\0|\0{8}){2}")
# name, mode, uid, gid, size, mtime, checksum, type, linkname, magic, version, uname, gname, devmajor, devminor, prefix
_HEADER = struct.Struct("100s 8s 8s 8s 12s 12s 8s c 100s 6s 2s 32s 32s 8s 8s 155s 12x")


class Member(NamedTuple):
    """A regular file in a tar: `offset` and `size` of its payload in bytes."""

    name: str
    offset: int
    size: int


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a payload: mode 0644, owner 0, time 0. `name` is ASCII of at most 100 characters."""
    fields: list[bytes] = [
        name.encode("ascii"),
        b"0000644",
        b"0000000",
        b"0000000",
        b"%011o" % size,
        b"%011o" % 0,
        b" " * 8,  # the checksum is taken with its own field blank
        b"0",
        b"",
        b"ustar",
        b"00",
        b"",
        b"",
        b"",
        b"",
        b"",
    ]
    fields[6] = b"%06o\0 " % sum(_HEADER.pack(*fields))
    return _HEADER.pack(*fields)


def member(name: str, payload: bytes) -> bytes:
    """Header, payload and padding to whole blocks; the payload begins at byte 512 of it."""
    return b"".join((header(name, len(payload)), payload, bytes(-len(payload) % BLOCK)))


def member_bytes(size: int) -> int:
    """Bytes that a member with a payload of `size` takes."""
    return BLOCK + size + -size % BLOCK


def plain_member(block: bytes, place: int) -> Member | None:
    """The regular file whose header `block` is, at byte `place` of a tar; None for any header but POSIX's plain one.

    What is None, `members` judges; what is not, it would give back as the same member.
    """
    if len(block) != BLOCK or (rest := _sum_of_rest(block[_REST:])) is None:
        return None
    numbers = _NUMBERS.fullmatch(block, 100, _REST)
    if not numbers or _sum(block[:148]) + 8 * 32 + rest != int(numbers[2], 8):
        return None
    name = block[:100].partition(b"\0")[0]
    return Member(name.decode(), place + BLOCK, int(numbers[1], 8)) if name.isascii() else None


@lru_cache(maxsize=16)
def _sum_of_rest(rest: bytes) -> int | None:
    """Of a plain header's bytes behind its numbers, which all members of a shard share; None where it is not plain."""
    if rest[:1] != b"0" or rest[101:107] != b"ustar\0" or rest[189:344].strip(b"\0"):
        return None
    return sum(rest) if _DEVICES.fullmatch(rest, 173, 189) else None


def _sum(block: bytes) -> int:
    """Of up to 256 bytes, ten times as fast as `sum`: adler32's lower half is 1 and their sum."""
    return (zlib.adler32(block) & 0xFFFF) - 1


def members(path: Path) -> Iterator[Member]:
    """Every regular file of an uncompressed tar, in order; folders are passed over.

    A tar without its end blocks is accepted when it stops at a member's edge.
    Raises ShardError for a damaged, cut or compressed tar, and for links, devices and sparse files, which no reader of
    shards gives back as they went in.
    """
    try:
        with tarfile.open(path, "r:", tarinfo=_Bounded) as archive:
            reached = 0
            for entry in archive:
                if entry.offset_data < max(reached, BLOCK) or entry.size < 0:
                    raise ShardError(f"{path}: the member {entry.name!r} points backwards; restore the shard")
                reached = entry.offset_data + entry.size
                if entry.isdir():
                    continue
                if not entry.isreg() or entry.issparse():
                    raise ShardError(
                        f"{path}: {entry.name!r} is {_kind(entry)}, not a regular file; re-pack without it"
                    )
                yield Member(entry.name, entry.offset_data, entry.size)
            _check_end(path, archive.offset, reached)
    except tarfile.TarError as error:
        raise ShardError(f"{path} is not a readable, uncompressed tar ({error}); restore or re-pack it") from None
    except ShardError:
        raise
    except (MemoryError, OverflowError, RecursionError, ValueError):  # of sizes beyond what a file can have, and text
        raise ShardError(f"{path} has an impossible header; restore or re-pack it") from None
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror or error}); restore it") from None


class _Bounded(tarfile.TarInfo):
    """A header whose records, long names and pax's, are read only where they are no larger than names can be."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _RECORDS:
            if not 0 <= self.size <= _MAX_RECORD_BYTES:
                raise tarfile.ReadError(f"a header with {self.size} bytes of names")
            assert archive.fileobj is not None
            start = archive.fileobj.tell()
            content = archive.fileobj.read(self.size)
            archive.fileobj.seek(start)
            if self.type not in _LONG_NAMES and (_LONG_NUMBER.search(content) or b"GNU.sparse" in content):
                raise tarfile.ReadError("a header with an impossible number, or of a sparse file")
        return super()._proc_member(archive)  # type: ignore[misc]


def _check_end(path: Path, offset: int, reached: int) -> None:
    """`tarfile` stops quietly at a damaged header: the walk is whole only at zeros or at the end of the file."""
    size = path.stat().st_size
    if reached > size:
        raise ShardError(f"{path} is cut inside its last member; restore it")
    with path.open("rb") as file:
        file.seek(offset)
        block = file.read(BLOCK)
    if block.strip(b"\0"):
        raise ShardError(f"{path} has a damaged header at byte {offset}; restore it")


def _kind(entry: tarfile.TarInfo) -> str:
    kinds = {
        tarfile.SYMTYPE: "a symbolic link",
        tarfile.LNKTYPE: "a hard link",
        tarfile.CHRTYPE: "a device",
        tarfile.BLKTYPE: "a device",
        tarfile.FIFOTYPE: "a pipe",
    }
    return "a sparse file" if entry.issparse() else kinds.get(entry.type, "of an unknown type")
