"""Images of a source become shards: one seeded shuffle of all, a strict decode of each, original bytes, resumable.

Workers read, decode and (on request) shrink images in parallel but in order; this process cuts shards from the stream.
Every file is written beside its place, flushed and renamed; after each shard the journal notes it, and the manifest
comes last. The same source and options give the same bytes, however often the work was interrupted on the way.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools import disk, index, progress, tar
from shard_tools.census import Census, counted, printable, readable, size_quantiles
from shard_tools.images import BadImage, Facts, Prepared, Resize, prepare
from shard_tools.journal import JOURNAL_NAME, Journal
from shard_tools.manifest import INDEX_NAME, LABELS_NAME, MANIFEST_NAME, Manifest, ShardError, splits
from shard_tools.shards import Part, ShardCutter
from shard_tools.sources import Item, Source
from shard_tools.workers import in_order

QUARANTINE_NAME = "quarantine.txt"
_OVERHEAD_BYTES = 4 * tar.BLOCK + 256  # of a sample beyond its image: headers, label, metadata, index; for estimates


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


def pack(source: Source, dst: Path, options: PackOptions) -> Packed:
    """Write the shards of `source` to dst/<split>.

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
        return _pack(source, items, dst, options, fingerprint)


def _pack(source: Source, items: list[Item], dst: Path, options: PackOptions, fingerprint: str) -> Packed:
    folder = dst / source.split
    _refuse_strangers(folder, source.split)
    for leftover in folder.glob(f"*{disk.PARTIAL}"):
        leftover.unlink()
    with disk.full_disk_explained(folder, "complete shards are kept: make room and run the same command again"):
        journal = Journal(folder, fingerprint, options.on_bad)
        kept = len(journal.entries)
        rest = items[journal.entries[-1].consumed if kept else 0 :]
        _check_space(folder, rest, options)
        try:
            with progress.shown(source.split, len(rest)) as bar:
                _write_shards(source, rest, len(items), journal, options, bar)
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
        raise ShardError(f"{faults[0]}; pack it again with --overwrite")
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
    source: Source, rest: list[Item], num_items: int, journal: Journal, options: PackOptions, bar: progress.Progress
) -> None:
    """Pack the items that are left, shard by shard, each noted in the journal when it is in place."""
    cutter = ShardCutter(journal, source.split, options.shard_size, options.shard_bytes)
    outcomes = in_order(partial(_prepare, source.read, options.resize), rest, options.workers)
    try:
        for position, (item, outcome) in enumerate(zip(rest, outcomes), start=num_items - len(rest)):
            if isinstance(outcome, Prepared):
                cutter.add(_parts(source, item, outcome), item.label, outcome.facts, position)
                cutter.census.add(item.name, outcome.original, reencoded=outcome.facts is not outcome.original)
                bar.advance(len(outcome.payload))
            else:
                _add_bad(cutter, source, item, outcome, position, options.on_bad)
                bar.advance(0)
        cutter.close(num_items)
    finally:
        outcomes.close()
        cutter.discard()
    if cutter.num_rows == 0:
        raise ShardError(f"none of the {num_items} files of {source.split!r} is a usable image; check SRC")
    if cutter.census.bad:
        raise ShardError(f"the source of {source.split!r} changed since the interruption; start over with --overwrite")


def _add_bad(cutter: ShardCutter, source: Source, item: Item, bad: _Rejected, position: int, on_bad: str) -> None:
    """Leave a bad file out, pack it as it is, or raise ShardError, as `on_bad` says."""
    name = readable(item.name)
    if on_bad == "fail":
        raise ShardError(
            f"{printable(name)} is no good image ({bad.reason}); repair or remove it, or leave bad files out with"
            " --on-bad quarantine"
        )
    if on_bad == "keep" and bad.facts is not None:
        parts = _parts(source, item, Prepared(bad.data, bad.facts, bad.facts))
        row = cutter.add(parts, item.label, bad.facts, position)
        cutter.census.add_bad(name, bad.reason, "kept", row)
    else:
        cutter.census.add_bad(name, bad.reason, "quarantined")


@dataclass(frozen=True, slots=True)
class _Rejected:
    """A file that is not a good image; `facts` and `data` only where its header could be read."""

    reason: str
    facts: Facts | None = None
    data: bytes = b""


def _prepare(read: Callable[[Item], bytes], resize: Resize | None, item: Item) -> Prepared | _Rejected:
    """In a worker: one item's bytes, decoded to the end and re-encoded on request."""
    try:
        data = read(item)
    except OSError as error:
        return _Rejected(f"cannot be read ({error.strerror or type(error).__name__})")
    except BadImage as bad:
        return _Rejected(str(bad))
    try:
        return prepare(data, resize)
    except BadImage as bad:
        return _Rejected(str(bad), bad.facts, data if bad.facts else b"")


def _parts(source: Source, item: Item, sample: Prepared) -> list[Part]:
    """The members of one sample: image, label if there is one, metadata (with the labels where there are several)."""
    meta: dict[str, Any] = {"name": readable(item.name), "width": sample.facts.width, "height": sample.facts.height}
    parts = [(sample.facts.extension, sample.payload)]
    if source.multi_label:
        meta["labels"] = {name: value for name, value in zip(source.classes or (), item.labels) if value}
    elif source.classes is not None:
        meta["class"] = source.classes[item.label]
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
        disk.write_file(folder / MANIFEST_NAME, manifest.to_bytes())
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
