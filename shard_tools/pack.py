"""Images of a source become shards: one seeded shuffle of all, a strict decode of each, original bytes, resumable.

Workers read, decode and (on request) shrink images and write them; this process decides what makes a shard (see
shards.py) and puts the shards in their place, in order. Every file is written beside its place, flushed and renamed;
after each shard the journal notes it, and the manifest comes last. The same source and options give the same bytes,
whoever does the work and however often it was interrupted on the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools import disk, index, progress, tar
from shard_tools.census import Census, counted, printable, readable, size_quantiles
from shard_tools.engines import Engine, local
from shard_tools.images import BadImage, Prepared, Resize, prepare
from shard_tools.journal import JOURNAL_NAME, Journal
from shard_tools.manifest import INDEX_NAME, LABELS_NAME, MANIFEST_NAME, Damaged, Manifest, ShardError, splits
from shard_tools.shards import Cut, Part, Piece, PieceWriter, Rejected, ShardCutter, build, is_whole, sample_of
from shard_tools.sources import Item, Source

QUARANTINE_NAME = "quarantine.txt"
_OVERHEAD_BYTES = 4 * tar.BLOCK + 256  # of a sample beyond its image: headers, label, metadata, index; for estimates
_LEAST_TASK = 16  # images: fewer are not worth a task's cost
_TASKS_PER_WORKER = 2  # of what is left when a shard for each worker is not


@dataclass(frozen=True)
class PackOptions:
    """How to pack.

    shard_size   most samples in a shard
    shard_bytes  most bytes in a shard, 0 for no limit (a single larger image still gets one)
    resize       shrink images, or None to keep the original bytes
    limit        keep that many samples of the shuffled order, 0 for all
    on_bad       fail: stop at the first bad image; quarantine: leave bad images out and list them;
                 keep: pack those whose header can be read as they are, quarantine the rest
    subset       names to keep: file names, or paths within the source where file names repeat
    Raises ShardError for values that make no sense.
    """

    shard_size: int = 1000
    shard_bytes: int = 0
    resize: Resize | None = None
    workers: int = 1
    seed: int = 0
    limit: int = 0
    on_bad: str = "fail"
    subset: tuple[str, ...] | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        for key, least in (("shard_size", 1), ("shard_bytes", 0), ("workers", 1), ("seed", 0), ("limit", 0)):
            if not least <= getattr(self, key) < 2**63:
                raise ShardError(f"--{key.replace('_', '-')} is {getattr(self, key)}, but must be at least {least}")
        if self.on_bad not in ("fail", "quarantine", "keep"):
            raise ShardError(f"--on-bad is {self.on_bad!r}, but must be fail, quarantine or keep")

    def recorded(self) -> dict[str, Any]:
        """The options that shape the bytes; workers do not, and on_bad stands beside each bad file."""
        resize = self.resize or Resize(quality=0)
        return {
            "shard_size": self.shard_size,
            "shard_bytes": self.shard_bytes,
            "max_side": resize.max_side,
            "short_side": resize.short_side,
            "quality": resize.quality,
            "seed": self.seed,
            "limit": self.limit,
            "subset": None if self.subset is None else len(self.subset),
        }


@dataclass(frozen=True)
class Packed:
    """What `pack` did. `progress` is None where the same pack was finished before and nothing was done."""

    manifest: Manifest
    progress: progress.Progress | None
    num_shards_kept: int  # complete shards found from an interrupted run


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a pack; the message says how to continue."""


def pack(
    source: Source, dst: Path, options: PackOptions, engine: AbstractContextManager[Engine] | None = None
) -> Packed:
    """Write the shards of `source` to dst/<split>: the same bytes on any engine, by default options.workers processes.

    Raises ShardError for bad input, disk.DiskFull for a full disk (complete shards are kept), Interrupted on Ctrl-C.
    """
    items = _ordered(source, options)
    fingerprint = _fingerprint(source, items, options)
    folder = dst / source.split
    with disk.full_disk_explained(folder, "choose a folder that can be written"):
        folder.mkdir(parents=True, exist_ok=True)
    with disk.locked(folder):
        if options.overwrite:
            _remove(folder, source)
        elif (folder / MANIFEST_NAME).exists():
            return Packed(_finished(dst, source.split, fingerprint, options), None, 0)
        try:
            return _pack(source, items, dst, options, engine or local(options.workers), fingerprint)
        finally:
            _remove_partial(folder)


def _pack(
    source: Source,
    items: list[Item],
    dst: Path,
    options: PackOptions,
    engine: AbstractContextManager[Engine],
    fingerprint: str,
) -> Packed:
    folder = dst / source.split
    _refuse_strangers(folder, source.split)
    _remove_partial(folder)
    with disk.full_disk_explained(folder, "complete shards are kept: make room and run the same command again"):
        journal = Journal(folder, fingerprint, options.on_bad)
        kept = len(journal.entries)
        rest = items[journal.entries[-1].consumed if kept else 0 :]
        _check_space(folder, rest, options)
        try:
            with progress.shown(source.split, len(rest)) as bar, engine as running:
                _write_shards(source, rest, len(items), journal, options, running, bar)
                manifest = _finish(source, items, dst, options, fingerprint, journal)
        except KeyboardInterrupt:
            done = f"{counted(len(journal.entries), 'complete shard')} kept in {folder}"
            raise Interrupted(f"interrupted with {done}; the same command continues from there") from None
    return Packed(manifest, bar, kept)


def _ordered(source: Source, options: PackOptions) -> list[Item]:
    """The items to pack in their order: a subset, shuffled over the whole, cut to the limit."""
    items = list(source.items) if options.subset is None else _subset(source.items, options.subset)
    if not items:
        raise ShardError(
            f"the {source.kind} source has no images for the split {source.split!r}; check SRC and --split"
        )
    # raw Philox words and a stable sort, because NumPy promises the same raw stream in every version
    keys = np.random.Philox(key=options.seed).random_raw(len(items))
    order = np.argsort(keys, kind="stable").tolist()
    return [items[i] for i in order[: options.limit or len(items)]]


def _subset(items: Sequence[Item], names: Sequence[str]) -> list[Item]:
    """Items whose path or file name is listed; a file name must be unique to stand for its item."""
    by_path = {item.name: i for i, item in enumerate(items)}
    by_name: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        by_name.setdefault(item.name.rpartition("/")[2], []).append(i)
    chosen, missing = set(), []
    for name in names:
        if name in by_path:
            chosen.add(by_path[name])
            continue
        found = by_name.get(name.rpartition("/")[2], [])
        if len(found) > 1:
            raise ShardError(f"--subset-file: {name!r} is the name of {len(found)} files; write their paths within SRC")
        chosen.update(found)
        if not found:
            missing.append(name)
    if missing:
        raise ShardError(
            f"--subset-file: {len(missing)} of {len(names)} names are not in the source, such as {missing[0]!r};"
            " check SRC and the list"
        )
    return [items[i] for i in sorted(chosen)]


def _fingerprint(source: Source, items: Sequence[Item], options: PackOptions) -> str:
    """sha256 of all that decides the bytes but the images themselves: what a re-run must have in common."""
    head = [source.kind, source.split, source.classes, options.recorded(), *source.content]
    digest = hashlib.sha256(json.dumps(head).encode())
    for item in items:
        digest.update(f"\n{item.label} {item.size} {item.name}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _remove_partial(folder: Path) -> None:
    for leftover in folder.glob(f"*{disk.PARTIAL}"):
        leftover.unlink(missing_ok=True)


def _remove(folder: Path, source: Source) -> None:
    """Delete what an earlier pack wrote to `folder`, the manifest first: without it the split is not there."""
    (folder / MANIFEST_NAME).unlink(missing_ok=True)
    disk.sync_folder(folder)
    ours = re.compile(rf"{re.escape(source.split)}-\d{{6}}\.(tar|idx)|.*{re.escape(disk.PARTIAL)}")
    names = {JOURNAL_NAME, INDEX_NAME, LABELS_NAME, QUARANTINE_NAME, *source.side_files}
    for path in folder.iterdir():
        if path.name in names or ours.fullmatch(path.name):
            path.unlink()


def _finished(dst: Path, split: str, fingerprint: str, options: PackOptions) -> Manifest:
    """The manifest of an earlier, finished pack if it was the same one; else ShardError."""
    folder = dst / split
    manifest = Manifest.load(folder)
    other_policy = manifest.census.get("bad") and manifest.options.get("on_bad") != options.on_bad
    if manifest.source.get("fingerprint") != fingerprint or other_policy:
        raise ShardError(f"{folder} holds a pack of other files or options; choose another folder, or add --overwrite")
    if faults := manifest.check_quick():
        raise Damaged(f"{faults[0]}; pack it again with --overwrite")
    (folder / JOURNAL_NAME).unlink(missing_ok=True)
    with disk.locked(dst, wait=True):
        write_info(dst, manifest)
    return manifest


def _refuse_strangers(folder: Path, split: str) -> None:
    """Shards without a journal are not ours to replace."""
    strangers = sorted(folder.glob(f"{split}-*.tar"))
    if strangers and not (folder / JOURNAL_NAME).exists():
        raise ShardError(
            f"{strangers[0]} is there already, without a manifest; choose another folder, replace it with --overwrite,"
            " or adopt it with `shard_tools index`"
        )


def _check_space(folder: Path, items: Sequence[Item], options: PackOptions) -> None:
    """Refuse at the start what cannot fit; only an estimate, and none where images are shrunk."""
    needed = 0 if options.resize else sum(item.size + _OVERHEAD_BYTES for item in items)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise disk.DiskFull(
            f"{folder} needs about {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free; make room, or"
            " shrink the images with --short-side"
        )


def _write_shards(
    source: Source,
    rest: list[Item],
    num_items: int,
    journal: Journal,
    options: PackOptions,
    engine: Engine,
    bar: progress.Progress,
) -> None:
    """Pack the items that are left; each shard is noted in the journal when it is in place."""
    folder = journal.path.parent.resolve()
    cutter = ShardCutter(folder, source.split, journal.entries, options.shard_size, options.shard_bytes)
    stream = _Stream(source, rest, num_items - len(rest), cutter, options, bar)
    marker = disk.partial_path(folder / f"packing-{uuid.uuid4().hex}")
    marker.touch()
    try:
        job = _Job(
            folder,
            marker,
            source.read,
            options.resize,
            classes=source.classes or (),
            labelled=source.classes is not None and not source.multi_label,
            multi_label=source.multi_label,
            keep_bad=options.on_bad == "keep",
            probe=_probe(source, rest) if engine.is_remote else None,
        )
        pieces = engine.in_order(partial(_write_piece, job), stream.tasks(engine.width))
        with closing(pieces), closing(engine.in_order(build, stream.cuts(pieces), is_whole)) as built:
            for shard in built:
                path = folder / shard.entry.shard.name
                disk.put_in_place(path, shard.tar)
                disk.put_in_place(path.with_name(shard.entry.shard.idx_name), shard.idx)
                journal.append(shard.entry)
                stream.forget_pieces(shard.entry.consumed)
    finally:
        marker.unlink(missing_ok=True)  # tells the workers to stop
    if cutter.num_rows == 0:
        raise ShardError(f"none of the {num_items} files of {source.split!r} is a usable image; check SRC")
    if cutter.census.bad:
        raise ShardError(f"the source of {source.split!r} changed since the interruption; start over with --overwrite")


class _Stream:
    """The source's items on their way into shards: as tasks to workers, and as pieces back to the cutter."""

    def __init__(
        self,
        source: Source,
        rest: list[Item],
        first: int,
        cutter: ShardCutter,
        options: PackOptions,
        bar: progress.Progress,
    ):
        self._source, self._rest, self._cutter, self._options, self._bar = source, rest, cutter, options, bar
        self._first = first  # position in the source of the first item of `rest`
        self._done = 0  # items of `rest` that the cutter has seen
        self._pieces: deque[tuple[int, Path]] = deque()  # position behind the piece's last item, its file

    def tasks(self, width: int) -> Iterator[_Task]:
        """Runs of items, each a shard where no file is bad; towards the end smaller ones, so that few workers idle."""
        size, num_items = self._options.shard_size, len(self._rest)
        given = 0
        while given < num_items:
            row = self._cutter.num_rows + given - self._done  # if all the files under way are good
            most = size
            if width > 1 and num_items - given < width * size:
                most = min(size, max(_LEAST_TASK, (num_items - given) // (_TASKS_PER_WORKER * width)))
            count = min(most, size - row % size)
            yield _Task(self._rest[given : given + count], row, hashed=most == size)
            given += count

    def cuts(self, pieces: Iterable[Piece]) -> Iterator[Cut]:
        """The shards that the samples of `pieces` make."""
        cutter = self._cutter
        for piece in pieces:
            offset = 0
            self._pieces.append((self._first + self._done + len(piece.outcomes), piece.path))
            for outcome in piece.outcomes:
                item = self._rest[self._done]
                sample = sample_of(outcome)
                if sample is not None and cutter.is_full(sample) and (cut := cutter.cut(self._first + self._done)):
                    yield cut
                if isinstance(outcome, Rejected):
                    _add_bad(cutter, item, outcome, piece, offset, self._options.on_bad)
                else:
                    cutter.add(outcome, piece, offset)
                    reencoded = outcome.facts is not outcome.original
                    cutter.census.add(item.name, outcome.original, reencoded)
                offset += sample.num_bytes if sample is not None else 0
                self._done += 1
                self._bar.advance(sample.parts[0][1] if sample is not None else 0)
        if cut := cutter.cut(self._first + self._done):
            yield cut

    def forget_pieces(self, consumed: int) -> None:
        """Delete the pieces of which every item lies before `consumed`, those that became a shard apart."""
        while self._pieces and self._pieces[0][0] <= consumed:
            self._pieces.popleft()[1].unlink(missing_ok=True)


def _add_bad(cutter: ShardCutter, item: Item, bad: Rejected, piece: Piece, offset: int, on_bad: str) -> None:
    """Leave a bad file out, pack it as it is, or raise ShardError, as `on_bad` says."""
    name = readable(item.name)
    if on_bad == "fail":
        raise ShardError(
            f"{printable(name)} is no good image ({bad.reason}); repair or remove it, or leave bad files out with"
            " --on-bad quarantine"
        )
    if bad.sample is not None:
        cutter.census.add_bad(name, bad.reason, "kept", cutter.add(bad.sample, piece, offset))
    else:
        cutter.census.add_bad(name, bad.reason, "quarantined")


@dataclass(frozen=True)
class _Job:
    """What a worker knows of a pack. `marker` is a file in `folder` that is there as long as the pack goes on.

    probe   an item that the process which plans can read; a worker on another machine must see it too
    """

    folder: Path
    marker: Path
    read: Callable[[Item], bytes]
    resize: Resize | None
    classes: tuple[str, ...]
    labelled: bool
    multi_label: bool
    keep_bad: bool
    probe: Item | None


@dataclass(frozen=True)
class _Task:
    """Items for one piece, the row of the first if none before it is left out, and whether it may become a shard."""

    items: list[Item]
    first_row: int
    hashed: bool


def _probe(source: Source, items: Sequence[Item]) -> Item | None:
    """The first item that can be read here, of the first few."""
    for item in items[:16]:
        with contextlib.suppress(OSError, BadImage):
            source.read(item)
            return item
    return None


def _write_piece(job: _Job, task: _Task) -> Piece:
    """In a worker: the items' images, checked and shrunk, as a tar."""
    _check_sees(job)
    piece = PieceWriter(job.folder, task.first_row, task.hashed)
    try:
        for number, item in enumerate(task.items):
            if number % _LEAST_TASK == 0 and not job.marker.exists():
                raise ShardError("the pack was stopped; run the same command again")
            image, reason = _prepare(job.read, job.resize, item)
            if image is None or (reason and not job.keep_bad):
                piece.reject(reason)
            else:
                piece.add(_parts(job, item, image), item.label, image, reason)
        return piece.close()
    except BaseException:
        piece.discard()
        raise


def _check_sees(job: _Job) -> None:
    """Raises ShardError where this machine has not the source and the destination of the pack."""
    if not job.marker.exists():
        raise ShardError(
            f"{platform.node()} does not see {job.folder}, or the pack was stopped; mount DST under the same path"
            " on every worker"
        )
    if job.probe is not None:
        try:
            job.read(job.probe)
        except OSError as error:
            raise ShardError(
                f"{platform.node()} cannot read {printable(readable(job.probe.name))} of SRC"
                f" ({error.strerror or type(error).__name__}); mount SRC under the same path on every worker"
            ) from None


def _prepare(read: Callable[[Item], bytes], resize: Resize | None, item: Item) -> tuple[Prepared | None, str]:
    """One item's image, decoded to the end and re-encoded on request, and what is bad about it, or "".

    No image where not even the header could be read.
    """
    try:
        data = read(item)
    except OSError as error:
        return None, f"cannot be read ({error.strerror or type(error).__name__})"
    except BadImage as bad:
        return None, str(bad)
    try:
        return prepare(data, resize), ""
    except BadImage as bad:
        return Prepared(data, bad.facts, bad.facts) if bad.facts else None, str(bad)


def _parts(job: _Job, item: Item, image: Prepared) -> list[Part]:
    """The members of one sample: image, label if there is one, metadata (with the labels where there are several)."""
    meta: dict[str, Any] = {"name": readable(item.name), "width": image.facts.width, "height": image.facts.height}
    parts = [(image.facts.extension, image.payload)]
    if job.multi_label:
        meta["labels"] = {name: value for name, value in zip(job.classes, item.labels) if value}
    elif job.labelled:
        meta["class"] = job.classes[item.label]
        parts.append(("cls", b"%d" % item.label))
    meta.update(item.meta)
    return [*parts, ("json", json.dumps(meta).encode())]


def _finish(
    source: Source, items: Sequence[Item], dst: Path, options: PackOptions, fingerprint: str, journal: Journal
) -> Manifest:
    """All that stands beside the shards; the manifest last, and then the journal goes."""
    folder = dst / source.split
    rows = np.concatenate([entry.rows for entry in journal.entries])
    npy = index.npy_bytes(rows)
    census = Census()
    for entry in journal.entries:
        census.merge(entry.census)
    labels = _labels_npy(items, census) if source.multi_label else b""
    manifest = Manifest(
        root=folder,
        split=source.split,
        shards=tuple(entry.shard for entry in journal.entries),
        classes=source.classes,
        num_samples=len(rows),
        census={**census.to_json(), "quantiles": size_quantiles(rows)},
        source={"kind": source.kind, "num_items": len(source.items), "fingerprint": fingerprint, **source.notes},
        options={**options.recorded(), "on_bad": options.on_bad if census.bad else "fail"},
        index_sha256=hashlib.sha256(npy).hexdigest(),
        labels_sha256=hashlib.sha256(labels).hexdigest() if labels else "",
    )
    document = manifest.to_bytes()  # first, as it may be refused
    disk.write_file(folder / INDEX_NAME, npy)
    if labels:
        disk.write_file(folder / LABELS_NAME, labels)
    if census.bad:
        lines = [f"{printable(bad['name'])}\t{bad['reason']}\t{bad['action']}\n" for bad in census.bad]
        disk.write_file(folder / QUARANTINE_NAME, "".join(lines).encode())
    for name, content in source.side_files.items():
        disk.write_file(folder / name, content)
    with disk.locked(dst, wait=True):  # or two splits packed at once would each leave the other out of _info.json
        write_info(dst, manifest)
        disk.write_file(folder / MANIFEST_NAME, document)
    journal.remove()
    return manifest


def _labels_npy(items: Sequence[Item], census: Census) -> bytes:
    """The labels of all packed items, in the order of their rows."""
    left_out = {bad["name"] for bad in census.bad if bad["action"] == "quarantined"}
    return index.npy_bytes(np.array([item.labels for item in items if readable(item.name) not in left_out], np.int8))


def write_info(dst: Path, manifest: Manifest) -> None:
    """timm's index in `dst`: the split of `manifest`, and all others that are finished there."""
    others = [Manifest.load(dst / split) for split in splits(dst) if split != manifest.split]
    content = index.info_bytes(dst, [manifest, *others])
    path = dst / index.INFO_NAME
    if not path.is_file() or path.read_bytes() != content:
        disk.write_file(path, content)
