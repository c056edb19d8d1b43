"""Foreign WebDataset shards taken as they are: read once, then an index, a manifest and `.idx` files beside them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from shard_tools import checksum, disk, index, progress
from shard_tools.census import Census, printable, size_quantiles
from shard_tools.foreign import Sample, check_size, numbered_classes, read_payload, read_samples
from shard_tools.images import BadImage, inspect
from shard_tools.manifest import INDEX_DTYPE, INDEX_NAME, MANIFEST_NAME, Manifest, Shard, ShardError, sha256_of
from shard_tools.workers import in_order

KIND = "adopted"


@dataclass(frozen=True)
class AdoptOptions:
    """on_bad: fail, or quarantine to leave bad images out of the index; classes: names of the labels, or None."""

    split: str = "train"
    classes: tuple[str, ...] | None = None
    on_bad: str = "fail"
    workers: int = 1
    overwrite: bool = False


def adopt(folder: Path, options: AdoptOptions) -> list[Manifest]:
    """Index the tars in `folder`, or in each of its subfolders, which then are the splits; no tar is changed.

    Raises ShardError for shards that readers would misread (see foreign.py), bad images, and files in the way.
    """
    if not folder.is_dir():
        raise ShardError(f"no such folder of shards: {folder}; give one that holds .tar files")
    if _tars(folder):
        below = {options.split: folder}
    else:
        below = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and _tars(path)}
    if not below:
        packed = sorted([*folder.glob("*.tar.gz"), *folder.glob("*.tgz")])
        remedy = f"unpack {packed[0].name} with gunzip first" if packed else "give a folder of shards"
        raise ShardError(f"{folder} holds no .tar files; {remedy}")
    manifests = [_adopt_split(path, split, options) for split, path in below.items()]
    with disk.full_disk_explained(folder, "make room and run the same command again"):
        disk.write_file(folder / index.INFO_NAME, index.info_bytes(folder, manifests))
        for manifest in manifests:
            disk.write_file(manifest.root / MANIFEST_NAME, manifest.to_bytes())
    return manifests


@dataclass(frozen=True)
class _Scanned:
    """One foreign shard, read to the end."""

    shard: Shard
    rows: np.ndarray
    idx: bytes
    census: Census


def _adopt_split(folder: Path, split: str, options: AdoptOptions) -> Manifest:
    """Everything of one split but its manifest."""
    if (folder / MANIFEST_NAME).exists() and not options.overwrite:
        raise ShardError(f"{folder} has a manifest already; check it with `shard_tools verify`, or add --overwrite")
    paths = _tars(folder)
    scanned: list[_Scanned] = []
    with progress.shown(split, len(paths)) as bar:
        work = partial(_scan, options.on_bad)
        for result in in_order(work, list(enumerate(paths)), options.workers, chunk=1):
            scanned.append(result)
            bar.advance(result.shard.num_bytes)
    rows = np.concatenate([result.rows for result in scanned])
    if not len(rows):
        raise ShardError(f"{folder} holds no usable sample; check the shards")
    npy = index.npy_bytes(rows)
    census = Census()
    for result in scanned:
        census.merge(result.census)
    manifest = Manifest(
        root=folder,
        split=split,
        shards=tuple(result.shard for result in scanned),
        classes=numbered_classes(set(rows["label"].tolist()), options.classes, folder),
        num_samples=len(rows),
        census={**census.to_json(), "quantiles": size_quantiles(rows)},
        source={"kind": KIND, "num_items": len(rows) + len(census.bad)},
        options={"on_bad": options.on_bad},
        index_sha256=hashlib.sha256(npy).hexdigest(),
    )
    with disk.full_disk_explained(folder, "make room and run the same command again"), disk.locked(folder):
        _write_beside(folder, scanned, options.overwrite)
        disk.write_file(folder / INDEX_NAME, npy)
    return manifest


def _write_beside(folder: Path, scanned: list[_Scanned], overwrite: bool) -> None:
    if overwrite:
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
    for result in scanned:
        path = folder / result.shard.idx_name
        if path.exists() and path.read_bytes() != result.idx and not overwrite:
            raise ShardError(f"{path} is there already and says something else; add --overwrite to replace it")
        disk.write_file(path, result.idx)


def _tars(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def _scan(on_bad: str, numbered: tuple[int, Path]) -> _Scanned:
    """In a worker: one shard's rows, index lines, census and hash."""
    number, path = numbered
    samples = read_samples(path)
    if not samples:
        raise ShardError(f"{path} holds no samples; remove it")
    census = Census()
    rows: list[index.Row] = []
    lines: list[str] = []
    for sample in samples:
        name = f"{path.name}:{sample.image.name}"
        check_size(path, sample)
        payload = read_payload(path, sample.image)
        try:
            facts = inspect(payload)
        except BadImage as bad:
            if on_bad == "fail":
                raise ShardError(
                    f"{printable(name)} is no good image ({bad}); leave bad images out with --on-bad quarantine"
                ) from None
            census.add_bad(name, str(bad), "quarantined")
            continue
        census.add(name, facts, reencoded=False)
        image = sample.image
        row = (number, image.offset, image.size, sample.label, checksum.crc32(payload), facts.width, facts.height)
        rows.append(row)
        lines.append(idx_line(sample))
    idx = index.idx_bytes(lines)
    digest = hashlib.sha256(idx).hexdigest()
    shard = Shard(path.name, path.stat().st_size, len(rows), sha256_of(path), digest)
    return _Scanned(shard, np.array(rows, INDEX_DTYPE), idx, census)


def idx_line(sample: Sample) -> str:
    """DALI's line for a foreign sample: all members without blanks in their extension."""
    parts = [(ext, member.offset, member.size, member.name) for ext, member in sample.members.items()]
    return index.idx_line(part for part in parts if part[0].isascii() and part[0].isprintable() and " " not in part[0])
