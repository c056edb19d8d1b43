"""WebDataset shards of any origin, to be packed again: shuffled, checked, shrunk, with an index and a manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from shard_tools.foreign import Sample, numbered_classes, read_payload, read_samples
from shard_tools.manifest import MANIFEST_NAME, MAX_MEMBER_BYTES, Manifest, ShardError
from shard_tools.sources import Item, Source

_MAX_SHARDS = 10**6


def open_source(src: str, split: str, class_names: tuple[str, ...] | None = None) -> Source:
    """The samples of `src`: a tar, a folder of tars (or of the split's), or a path with braces (x-{000..012}.tar).

    Names come from the samples' own metadata ("name" in .json) where our packs put them, else from shard and key.
    Raises ShardError for anything but local paths.
    """
    paths = shard_paths(src, split)
    class_names = class_names or _packed_classes(paths[0].parent)
    items, labels = [], set()
    for shard in paths:
        for sample in read_samples(shard):
            labels.add(sample.label)
            items.append(Item(_name(shard, sample), sample.label, sample.image.size, (str(shard), sample.image)))
    classes = numbered_classes(labels, class_names, src) if items else None
    return Source("webdataset", split, items, classes, _read)


def shard_paths(src: str, split: str) -> list[Path]:
    """The tars that `src` means, sorted where it is a folder; raises ShardError where one is missing."""
    if "::" in src or re.match(r"\w+:", src):
        raise ShardError(f"{src!r} is not a local path; copy the shards to a disk first")
    if not Path(src).is_dir():
        paths = [Path(name) for name in _expanded(src)]
        if missing := [path for path in paths if not path.is_file()]:
            raise ShardError(f"{len(missing)} of {len(paths)} shards are missing, such as {missing[0]}; check SRC")
        return paths
    for folder in (Path(src) / split, Path(src)):
        if paths := sorted(folder.glob("*.tar")):
            return paths
    raise ShardError(f"{src} holds no .tar files; give a folder of shards, or a path such as x-{{000..012}}.tar")


def _expanded(pattern: str) -> Iterator[str]:
    """Shell braces: {000..012} counts with its zeros, {a,b} lists."""
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    choices = [_choices(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    total = 1
    for choice in choices:
        total *= len(choice)
    if total > _MAX_SHARDS:
        raise ShardError(f"{pattern!r} means {total} shards, more than {_MAX_SHARDS}; check SRC")
    return ("".join(parts) for parts in product(*choices))


def _choices(text: str) -> list[str]:
    if counted := re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", text):
        first, last = counted.groups()
        if int(last) < int(first):
            raise ShardError(f"{{{text}}} counts backwards; check SRC")
        if int(last) - int(first) >= _MAX_SHARDS:
            raise ShardError(f"{{{text}}} means more than {_MAX_SHARDS} shards; check SRC")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        return [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
    return text.split(",") if "," in text else [f"{{{text}}}"]


def _packed_classes(folder: Path) -> tuple[str, ...] | None:
    return Manifest.load(folder).classes if (folder / MANIFEST_NAME).is_file() else None


def _name(shard: Path, sample: Sample) -> str:
    name = sample.meta.get("name")
    return name if isinstance(name, str) and name else f"{shard.name}/{sample.image.name}"


def _read(item: Item) -> bytes:
    shard, image = item.at
    if image.size > MAX_MEMBER_BYTES:
        raise OSError(0, f"more than {MAX_MEMBER_BYTES} bytes")
    return read_payload(Path(shard), image)
