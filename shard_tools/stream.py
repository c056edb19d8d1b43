"""A shard read once, from front to back: its sha256, its samples and their crc32, all from the same bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from shard_tools import checksum
from shard_tools.foreign import IMAGES, Sample, samples_of
from shard_tools.manifest import MAX_MEMBER_BYTES
from shard_tools.tar import BLOCK, Member, plain_member

_WINDOW = 2**19  # bytes: stays in a core's cache between the hash and the crc32


class NotPlain(Exception):
    """The tar has headers that `tarfile` has to judge: damaged ones, or extended ones that others write."""


class ShardStream:
    """The bytes of one file, forwards. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = io.FileIO(path)
        self._digest = hashlib.sha256()
        self._window = memoryview(bytearray(_WINDOW))
        self._start = self._end = 0  # places in the file of the bytes in the window

    def __enter__(self) -> ShardStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def samples(self) -> list[Sample]:
        """As foreign.read_samples, with `crc32` of the images. Raises ShardError as that, and NotPlain."""
        return samples_of(self._path, self._members(), self._note)

    def sha256(self) -> str:
        """Of the whole file; reads what is left of it."""
        while self._advance(self._end, self._end + 1):
            pass
        return self._digest.hexdigest()

    def _members(self) -> Iterator[Member]:
        """The members of a tar as `tar.members` gives them."""
        place = 0
        while (block := self._view(place, BLOCK).tobytes()).strip(b"\0") or not place:  # zeros or no more: the end
            member = plain_member(block, place)
            if member is None:
                raise NotPlain
            yield member
            place = member.offset + member.size + -member.size % BLOCK
            if place > self._end and not self._view(place - 1, 1):
                raise NotPlain  # cut inside its last member

    def _note(self, sample: Sample, extension: str, member: Member, most: int) -> bytes:
        if extension in IMAGES and member.size <= MAX_MEMBER_BYTES:
            sample.crc32[extension] = checksum.crc32(self._view(member.offset, member.size))
        return self._view(member.offset, min(member.size, most)).tobytes() if most else b""

    def _view(self, offset: int, size: int) -> memoryview:
        """`size` bytes at `offset`, fewer at the end of the file; none before the last ones asked for."""
        stop = offset + size
        if stop > self._end:
            self._advance(offset, stop)
            stop = max(offset, min(stop, self._end))
        return self._window[offset - self._start : stop - self._start]

    def _advance(self, offset: int, stop: int) -> bool:
        """Have the bytes from `offset` to `stop` in the window, as far as there are any; whether some were read."""
        while offset > self._end:  # what nobody asks for is hashed too
            self._start = self._end
            if not self._read_more():
                return False
        kept = self._window[offset - self._start : self._end - self._start]
        if stop - offset > len(self._window):
            window = memoryview(bytearray(stop - offset))
            window[: len(kept)] = kept
            self._window = window
        else:
            self._window[: len(kept)] = bytes(kept)
        self._start = offset
        before = self._end
        while self._end < stop and self._read_more():
            pass
        return self._end > before

    def _read_more(self) -> int:
        free = self._window[self._end - self._start :][:_WINDOW]
        count = self._file.readinto(free)
        self._digest.update(free[:count])
        self._end += count
        return count
