"""Shards against their manifest: quick by sizes, index and `.idx`, full by every byte, or with every image decoded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from shard_tools import checksum, disk, index, progress
from shard_tools.adopt import KIND as ADOPTED
from shard_tools.adopt import idx_line
from shard_tools.cache import OtherBytes, ShardCache, fetch_file
from shard_tools.foreign import Sample, read_payload, read_samples
from shard_tools.images import BadImage, inspect
from shard_tools.journal import JOURNAL_NAME
from shard_tools.manifest import MANIFEST_NAME, Manifest, Shard, ShardError, sha256_of, splits
from shard_tools.remote import NotThere, is_url
from shard_tools.stream import NotPlain, ShardStream
from shard_tools.workers import in_order

_MAX_FAULTS_PER_SHARD = 10
_MAX_IDX_LINE = 4096  # bytes of a sample's line
_REQUESTS = 16  # in flight: what is waited for is the network


def manifests_below(path: Path | str) -> list[Manifest]:
    """The manifest of a split folder, or those of all splits of DST; raises ShardError where there is none.

    path    a folder, or the URL of one
    """
    if is_url(path):
        return [Manifest.load(path, split) for split in splits(path)] or [Manifest.load(path)]
    path = Path(path)
    if (path / MANIFEST_NAME).is_file() or not splits(path):
        return [Manifest.load(path)]
    return [Manifest.load(path / split) for split in splits(path)]


def check_info(path: Path | str, manifests: Sequence[Manifest]) -> list[str]:
    """Faults of timm's `_info.json`, where `path` is the folder that should hold it; of a URL nothing is said."""
    if path != manifests[0].root.parent:
        return []
    path = Path(path)
    file = path / index.INFO_NAME
    if not file.is_file():
        return [f"{file} is missing"]
    expected = index.info_bytes(path, manifests)
    same = file.stat().st_size == len(expected) and file.read_bytes() == expected
    return [] if same else [f"{file} does not list the splits as their manifests do"]


def check(manifest: Manifest, *, full: bool = False, decode: bool = False, workers: int = 1) -> list[str]:
    """All faults of one split, a sentence each; [] is good.

    quick   every shard has its size, the index its hash and ranges, every .idx its hash; nothing is missing or too many
    full    also every shard's sha256, tar structure and labels, and every image's crc32; each shard is read once
    decode  also every image decodes, and is what the index says: true of bytes that are those packed, as `pack` and
            `index` decode strictly, unless the code that decodes has changed
    """
    faults = manifest.check_quick()
    if manifest.remote:
        faults += _remote_faults(manifest)
    else:
        faults += [*manifest.manifest_faults(), *_idx_faults(manifest), *_strangers(manifest)]
    if not (full or decode):
        return faults
    try:
        rows = manifest.index()
    except ShardError:
        return faults
    labels = _labels(manifest)
    tasks = [
        _Task(
            manifest.root / shard.name,
            shard,
            rows[first : first + shard.num_samples],
            first,
            None if labels is None else labels[first : first + shard.num_samples],
            _alone(manifest, shard),
        )
        for shard, first in zip(manifest.shards, _first_rows(manifest))
        if manifest.remote or _has_size(manifest.root / shard.name, shard.num_bytes)
    ]
    bad = manifest.census.get("bad", [])
    rules = _Rules(
        adopted=manifest.source.get("kind") == ADOPTED,
        labelled=manifest.labelled,
        bands=manifest.bands,
        decode=decode,
        kept=frozenset(entry["row"] for entry in bad if entry.get("action") == "kept"),
        quarantined=frozenset(entry["name"] for entry in bad if entry.get("action") == "quarantined"),
        classes=manifest.classes or (),
    )
    with progress.shown(manifest.split, manifest.num_samples) as bar:
        for task, found in zip(tasks, in_order(partial(_check_shard, rules), tasks, workers, chunk=1)):
            faults += found[:_MAX_FAULTS_PER_SHARD]
            if len(found) > _MAX_FAULTS_PER_SHARD:
                faults.append(f"{task.path} has {len(found) - _MAX_FAULTS_PER_SHARD} more faults")
            bar.advance(task.shard.num_bytes, task.shard.num_samples)
    return faults


def _labels(manifest: Manifest) -> np.ndarray | None:
    """labels.npy where it can be read; that it cannot is one of the quick faults."""
    try:
        return manifest.labels() if manifest.multi_label else None
    except ShardError:
        return None


def _idx_faults(manifest: Manifest) -> Iterator[str]:
    for shard in manifest.shards:
        path = manifest.root / shard.idx_name
        if not path.is_file():
            yield f"{path} is missing"
        elif sha256_of(path) != shard.idx_sha256:
            yield f"{path} is not the index of {shard.name} (its sha256 differs)"


def _remote_faults(manifest: Manifest) -> Iterator[str]:
    """Sizes and `.idx` of the shards behind a URL. Raises RemoteError where its server does not answer."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        for found in pool.map(partial(_remote_shard_faults, manifest), manifest.shards):
            yield from found


def _remote_shard_faults(manifest: Manifest, shard: Shard) -> list[str]:
    assert manifest.remote is not None
    try:
        num_bytes = (manifest.remote / shard.name).size()
    except NotThere as error:
        return [str(error)]
    faults = _remote_idx_faults(manifest, shard)
    if num_bytes != shard.num_bytes:
        path = manifest.remote / shard.name
        faults.append(f"{path} has {num_bytes} bytes, but its manifest says {shard.num_bytes}")
    return faults


def _remote_idx_faults(manifest: Manifest, shard: Shard) -> list[str]:
    assert manifest.remote is not None
    most = _MAX_IDX_LINE * (shard.num_samples + 1)
    try:
        fetch_file(manifest.remote / shard.idx_name, manifest.root / shard.idx_name, most, shard.idx_sha256)
    except (NotThere, OtherBytes) as error:
        return [str(error)]
    return []


def _alone(manifest: Manifest, shard: Shard) -> Manifest | None:
    return replace(manifest, shards=(shard,)) if manifest.remote else None


def _has_size(path: Path, num_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == num_bytes


def _strangers(manifest: Manifest) -> Iterator[str]:
    known = {shard.name for shard in manifest.shards}
    for path in sorted(manifest.root.iterdir()):
        if path.suffix == ".tar" and path.name not in known:
            yield f"{path} is not in the manifest"
        elif path.name.endswith(disk.PARTIAL) or path.name == JOURNAL_NAME:
            yield f"{path} is left from an unfinished write"


def _first_rows(manifest: Manifest) -> list[int]:
    counts = [0, *(shard.num_samples for shard in manifest.shards)]
    return np.cumsum(counts)[:-1].tolist()


@dataclass(frozen=True)
class _Task:
    """One shard to be read: its rows of the index, the first of which is row number `first`, and of labels.npy.

    remote  of a remote split, its manifest with this shard alone: the path is where the cache puts a copy
    """

    path: Path
    shard: Shard
    rows: np.ndarray
    first: int
    labels: np.ndarray | None
    remote: Manifest | None


@dataclass(frozen=True)
class _Rules:
    """What a split's shards may hold: `kept` are rows known not to decode, `quarantined` names left out on adoption."""

    adopted: bool
    labelled: bool
    bands: int
    decode: bool
    kept: frozenset[int]
    quarantined: frozenset[str]
    classes: tuple[str, ...]


def _check_shard(rules: _Rules, task: _Task) -> list[str]:
    """In a worker: all faults of one shard."""
    if task.remote is None:
        return _shard_faults(rules, task)
    faults = _remote_idx_faults(task.remote, task.shard)
    try:
        with ShardCache(task.remote).opened(0):
            return faults or _shard_faults(rules, task)
    except (NotThere, OtherBytes) as error:
        return [*faults, str(error)]


def _shard_faults(rules: _Rules, task: _Task) -> list[str]:
    faults = []
    try:
        found, digest = _read(task.path)
    except OSError as error:
        return [f"{task.path} cannot be read ({error.strerror}); restore it"]
    if digest != task.shard.sha256:
        faults.append(f"{task.path} is not the shard that was packed (its sha256 differs)")
    if isinstance(found, ShardError):
        return [*faults, str(found)]
    samples = found
    if rules.quarantined:
        samples = [s for s in found if f"{task.path.name}:{s.image.name}" not in rules.quarantined]
    if len(samples) != len(task.rows):
        return [*faults, f"{task.path} holds {len(samples)} samples, but its index {len(task.rows)}"]
    idx_path = task.path.with_name(task.shard.idx_name)
    if not idx_path.is_file() or idx_path.read_bytes() != index.idx_bytes([idx_line(sample) for sample in samples]):
        faults.append(f"{idx_path} does not describe {task.path.name}")
    for place, (sample, row) in enumerate(zip(samples, map(_Row._make, task.rows.tolist()))):
        what = _sample_fault(rules, task.path, sample, row, task.first + place)
        if not what and task.labels is not None:
            what = _labels_fault(rules, sample, task.labels[place])
        if what:
            faults.append(f"{task.path.name}:{sample.image.name} {what}")
    return faults


def _read(path: Path) -> tuple[list[Sample] | ShardError, str]:
    """The shard's samples, or what is wrong with its structure, and its sha256. Raises OSError."""
    found: list[Sample] | ShardError | None = None
    with ShardStream(path) as stream:
        try:
            found = stream.samples()
        except ShardError as error:
            found = error
        except NotPlain:
            pass
        digest = stream.sha256()
    if found is None:
        try:
            found = read_samples(path)
        except ShardError as error:
            found = error
    return found, digest


class _Row(NamedTuple):
    """As INDEX_DTYPE."""

    shard: int
    offset: int
    size: int
    label: int
    crc32: int
    width: int
    height: int


def _sample_fault(rules: _Rules, path: Path, sample: Sample, row: _Row, number: int) -> str:
    """What is wrong with one sample, or ""."""
    extension = sample.extension
    image = sample.members[extension]
    if (image.offset, image.size, sample.label) != (row.offset, row.size, row.label):
        return f"has another place, size or label than row {number} of the index"
    payload = read_payload(path, image) if rules.decode or extension not in sample.crc32 else b""
    if (checksum.crc32(payload) if payload else sample.crc32.get(extension, 0)) != row.crc32:
        return "is damaged (its crc32 differs)"
    if not rules.adopted and (fault := _name_fault(rules, sample, extension, row, number)):
        return fault
    if not rules.decode or number in rules.kept:
        return ""
    try:
        facts = inspect(payload)
    except BadImage as bad:
        return f"is no good image ({bad})"
    if facts.bands != rules.bands:
        return f"has {facts.bands} bands, but the manifest says {rules.bands}"
    return "" if (facts.width, facts.height) == (row.width, row.height) else "has other dimensions than its row"


def _labels_fault(rules: _Rules, sample: Sample, row: np.ndarray) -> str:
    """labels.npy must say of a sample what its .json says."""
    expected = {name: int(value) for name, value in zip(rules.classes, row) if value}
    return "" if sample.meta.get("labels") == expected else "has other labels in its metadata than in labels.npy"


def _name_fault(rules: _Rules, sample: Sample, extension: str, row: _Row, number: int) -> str:
    """Packed members are called after their row, and carry what the contract says."""
    extensions = [extension, "json", *(["cls"] if rules.labelled else [])]
    name = f"{number:09d}."
    if {member.name for member in sample.members.values()} != {name + extension for extension in extensions}:
        return f"is not what row {number} should be called, or has other members"
    size = (sample.meta.get("width"), sample.meta.get("height"))
    return "" if size == (row.width, row.height) else f"has another size in its metadata: {json.dumps(size)}"
