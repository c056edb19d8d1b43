"""Samples in, shards out: a stream is cut into tars, each put in place whole with its `.idx` and then journaled."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shard_tools import disk, index, tar
from shard_tools.census import Census
from shard_tools.images import Facts
from shard_tools.journal import Entry, Journal
from shard_tools.manifest import INDEX_DTYPE, Shard

# A member of a sample: extension without dot, payload. The first of a sample is its image.
Part = tuple[str, bytes]


class ShardCutter:
    """Continues behind the shards of `journal`. `census` is that of the shard in the making; the caller adds to it.

    shard_size   most samples in a shard
    shard_bytes  most bytes in a shard, 0 for no limit; a single sample above it gets a shard of its own
    """

    def __init__(self, journal: Journal, split: str, shard_size: int, shard_bytes: int):
        self.census = Census(bands=journal.entries[-1].census.bands if journal.entries else None)
        self.num_rows = sum(entry.shard.num_samples for entry in journal.entries)
        self._journal = journal
        self._split = split
        self._shard_size = shard_size
        self._shard_bytes = shard_bytes
        self._open: _OpenShard | None = None

    def add(self, parts: Sequence[Part], label: int, facts: Facts, position: int) -> int:
        """Append a sample, the source's item number `position`, and return its row.

        A full shard is closed only now: bad files behind its last sample still belong to its census.
        """
        if self._open is not None and self._is_full(self._open, parts):
            self.close(position)
        if self._open is None:
            number = len(self._journal.entries)
            self._open = _OpenShard(self._journal.path.parent / f"{self._split}-{number:06d}.tar", number)
        self._open.add(self.num_rows, parts, label, facts)
        self.num_rows += 1
        return self.num_rows - 1

    def close(self, position: int) -> None:
        """Put the open shard, if any, in place and note it; the source's items before `position` are consumed."""
        if self._open is not None:
            shard, rows = self._open.close()
            self._journal.append(Entry(shard, rows, self.census, position))
            self._open, self.census = None, Census(bands=self.census.bands)

    def discard(self) -> None:
        """Drop a shard that was not closed."""
        if self._open is not None:
            self._open.discard()
            self._open = None

    def _is_full(self, shard: _OpenShard, parts: Sequence[Part]) -> bool:
        needed = sum(tar.BLOCK + len(payload) + -len(payload) % tar.BLOCK for _, payload in parts) + len(tar.END)
        return len(shard.rows) >= self._shard_size or 0 < self._shard_bytes < shard.num_bytes + needed


class _OpenShard:
    """A tar that is being written beside its place."""

    def __init__(self, path: Path, number: int):
        self.rows: list[index.Row] = []
        self.num_bytes = 0
        self._path = path
        self._number = number
        self._lines: list[str] = []
        self._hash = hashlib.sha256()
        self._file = disk.partial_path(path).open("wb")

    def add(self, row: int, parts: Sequence[Part], label: int, facts: Facts) -> None:
        components = []
        for extension, payload in parts:
            name = f"{row:09d}.{extension}"
            components.append((extension, self.num_bytes + tar.BLOCK, len(payload), name))
            self._write(tar.member(name, payload))
        image = parts[0][1]
        _, offset, size, _ = components[0]
        self.rows.append((self._number, offset, size, label, zlib.crc32(image), facts.width, facts.height))
        self._lines.append(index.idx_line(components))

    def close(self) -> tuple[Shard, np.ndarray]:
        self._write(tar.END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        disk.put_in_place(self._path)
        idx = index.idx_bytes(self._lines)
        digest = hashlib.sha256(idx).hexdigest()
        shard = Shard(self._path.name, self.num_bytes, len(self.rows), self._hash.hexdigest(), digest)
        disk.write_file(self._path.with_name(shard.idx_name), idx)
        return shard, np.array(self.rows, INDEX_DTYPE)

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        disk.partial_path(self._path).unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.num_bytes += len(data)
