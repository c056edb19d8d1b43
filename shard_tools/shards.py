"""Samples in, shards out: images are written where they were decoded, and only facts of them travel.

A *piece* is a run of the source's items, written by a worker as the tar that it is if no file before it is left out.
One process cuts shards from the sequence of samples, as if it wrote them one by one; a shard that is one whole piece is
there already, any other is copied together from its pieces, by a worker again. So the bytes of a shard depend neither
on the pieces nor on who wrote them, and image bytes go through no pipe or network but that of the file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shard_tools import checksum, disk, index, tar
from shard_tools.census import Census
from shard_tools.images import Facts, Prepared
from shard_tools.journal import Entry
from shard_tools.manifest import INDEX_DTYPE, Shard

# A member of a sample: extension without dot, payload. The first of a sample is its image.
Part = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Sample:
    """What is known of a sample in a piece: `parts` are extension and payload size of its members in their order.

    facts, original   as in images.Prepared
    crc32             of the image as it is stored
    """

    label: int
    facts: Facts
    original: Facts
    crc32: int
    parts: tuple[tuple[str, int], ...]

    @property
    def num_bytes(self) -> int:
        """Headers and padding included."""
        return sum(tar.member_bytes(size) for _, size in self.parts)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A file that is no good image; `sample` is set where it is packed all the same."""

    reason: str
    sample: Sample | None = None


@dataclass(frozen=True)
class Piece:
    """A run of the source's items as a tar, with what became of each of them.

    first_row   that its members' names begin with
    sha256      of the whole file; "" for a piece that is smaller than a shard, so that nobody will ask
    """

    path: Path
    first_row: int
    outcomes: tuple[Sample | Rejected, ...]
    sha256: str

    @property
    def num_samples(self) -> int:
        return sum(sample_of(outcome) is not None for outcome in self.outcomes)


@dataclass(frozen=True)
class Run:
    """Neighbouring samples of a piece, the first at byte `offset`."""

    path: Path
    offset: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Cut:
    """A shard to be: its place and number, its first row, and the samples of which it consists.

    sha256      of the shard, where it is one whole piece; else ""
    census, consumed    as in journal.Entry
    """

    path: Path
    number: int
    first_row: int
    runs: tuple[Run, ...]
    sha256: str
    census: Census
    consumed: int


@dataclass(frozen=True)
class Built:
    """A shard on the disk beside its place, as `tar` and `idx`, and its line of the journal."""

    entry: Entry
    tar: Path
    idx: Path


def sample_of(outcome: Sample | Rejected) -> Sample | None:
    return outcome.sample if isinstance(outcome, Rejected) else outcome


class PieceWriter:
    """Writes a piece to `folder` under a name of its own: a task that is run twice never writes one file twice."""

    def __init__(self, folder: Path, first_row: int, hashed: bool):
        self.path = disk.partial_path(folder / f"piece-{uuid.uuid4().hex}")
        self._first_row, self._row = first_row, first_row
        self._outcomes: list[Sample | Rejected] = []
        self._tar = _TarFile(self.path, hashed)

    def add(self, parts: Sequence[Part], label: int, image: Prepared, reason: str = "") -> None:
        """Append a sample; `reason` says what is bad about one that is packed all the same."""
        for extension, payload in parts:
            self._tar.write(tar.member(f"{self._row:09d}.{extension}", payload))
        sizes = tuple((extension, len(payload)) for extension, payload in parts)
        sample = Sample(label, image.facts, image.original, checksum.crc32(image.payload), sizes)
        self._outcomes.append(Rejected(reason, sample) if reason else sample)
        self._row += 1

    def reject(self, reason: str) -> None:
        """Note a file that is left out."""
        self._outcomes.append(Rejected(reason))

    def close(self) -> Piece:
        self._tar.write(tar.END)
        return Piece(self.path, self._first_row, tuple(self._outcomes), self._tar.close())

    def discard(self) -> None:
        self._tar.discard()


class ShardCutter:
    """Decides which samples make a shard, continuing behind `entries`.

    census      of the shard in the making; the caller adds to it
    num_rows    samples so far
    shard_size  most samples in a shard
    shard_bytes most bytes in a shard, 0 for no limit; a single sample above it gets a shard of its own
    """

    def __init__(self, folder: Path, split: str, entries: Sequence[Entry], shard_size: int, shard_bytes: int):
        self.census = Census(bands=entries[-1].census.bands if entries else None)
        self.num_rows = sum(entry.shard.num_samples for entry in entries)
        self._folder, self._split, self._number = folder, split, len(entries)
        self._shard_size, self._shard_bytes = shard_size, shard_bytes
        self._begin()

    def is_full(self, sample: Sample) -> bool:
        """Whether the open shard must be cut before `sample`.

        Not sooner: bad files behind its last sample still belong to its census.
        """
        num_bytes = self._num_bytes + sample.num_bytes + len(tar.END)
        too_large = self._num_samples > 0 and 0 < self._shard_bytes < num_bytes
        return self._num_samples >= self._shard_size or too_large

    def add(self, sample: Sample, piece: Piece, offset: int) -> int:
        """Append the sample at byte `offset` of `piece` to the open shard, and return its row."""
        if not self._runs or self._runs[-1][0] is not piece:
            self._runs.append((piece, offset, []))
        self._runs[-1][2].append(sample)
        self._num_samples += 1
        self._num_bytes += sample.num_bytes
        self.num_rows += 1
        return self.num_rows - 1

    def cut(self, consumed: int) -> Cut | None:
        """The open shard, if it has samples; the source's items before `consumed` belong to it and those before."""
        if not self._runs:
            return None
        piece = self._runs[0][0]
        first_row = self.num_rows - self._num_samples
        whole = len(self._runs) == 1 and self._num_samples == piece.num_samples and piece.first_row == first_row
        cut = Cut(
            path=self._folder / f"{self._split}-{self._number:06d}.tar",
            number=self._number,
            first_row=first_row,
            runs=tuple(Run(piece.path, offset, tuple(samples)) for piece, offset, samples in self._runs),
            sha256=piece.sha256 if whole else "",
            census=self.census,
            consumed=consumed,
        )
        self._number += 1
        self.census = Census(bands=self.census.bands)
        self._begin()
        return cut

    def _begin(self) -> None:
        self._runs: list[tuple[Piece, int, list[Sample]]] = []  # piece, offset of the first sample, samples
        self._num_samples = self._num_bytes = 0


def is_whole(cut: Cut) -> bool:
    """Whether the shard is written already, and only has to reach the disk."""
    return bool(cut.sha256)


def build(cut: Cut) -> Built:
    """In a worker: the shard of `cut`, flushed, beside its place; its pieces are left as they are, or become it."""
    rows: list[index.Row] = []
    lines = []
    num_bytes = 0
    for row, sample in enumerate((sample for run in cut.runs for sample in run.samples), start=cut.first_row):
        components = []
        for extension, size in sample.parts:
            components.append((extension, num_bytes + tar.BLOCK, size, f"{row:09d}.{extension}"))
            num_bytes += tar.member_bytes(size)
        _, offset, size, _ = components[0]
        facts = sample.facts
        rows.append((cut.number, offset, size, sample.label, sample.crc32, facts.width, facts.height))
        lines.append(index.idx_line(components))
    own = disk.partial_path(cut.path.with_name(f"{cut.path.stem}-{uuid.uuid4().hex}"))
    place, sha256 = (cut.runs[0].path, cut.sha256) if is_whole(cut) else (own, _copy(cut, own))
    disk.sync_file(place)
    idx = index.idx_bytes(lines)
    idx_place = own.with_suffix(f".idx{disk.PARTIAL}")
    idx_place.write_bytes(idx)
    disk.sync_file(idx_place)
    idx_sha256 = hashlib.sha256(idx).hexdigest()
    shard = Shard(cut.path.name, num_bytes + len(tar.END), len(rows), sha256, idx_sha256)
    return Built(Entry(shard, np.array(rows, INDEX_DTYPE), cut.census, cut.consumed), place, idx_place)


def _copy(cut: Cut, path: Path) -> str:
    """Write the samples of `cut` to `path` under the names of their rows; returns the file's sha256."""
    row = cut.first_row
    written = _TarFile(path, hashed=True)
    try:
        for run in cut.runs:
            with run.path.open("rb") as piece:
                piece.seek(run.offset)
                for sample in run.samples:
                    for extension, size in sample.parts:
                        payload = piece.read(tar.member_bytes(size))[tar.BLOCK : tar.BLOCK + size]
                        written.write(tar.member(f"{row:09d}.{extension}", payload))
                    row += 1
        written.write(tar.END)
        return written.close()
    except BaseException:
        written.discard()
        raise


class _TarFile:
    """A file that is hashed while it is written, if asked for."""

    def __init__(self, path: Path, hashed: bool):
        self._path = path
        self._hash = hashlib.sha256() if hashed else None
        self._file = path.open("xb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        if self._hash is not None:
            self._hash.update(data)

    def close(self) -> str:
        """The file's sha256, or ""."""
        self._file.close()
        return self._hash.hexdigest() if self._hash is not None else ""

    def discard(self) -> None:
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)
