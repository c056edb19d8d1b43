"""ImageNet-1k as it is distributed: train/<wnid>/*.JPEG, and val in class folders or flat with a ground-truth file.

Classes are the wnids, sorted, which is the numbering of torchvision, timm and the published weights. The numbers 1 to
1000 of the ILSVRC development kit are another numbering; they are translated through the kit's meta.mat, or refused.
"""

from __future__ import annotations

import os
import re
import zlib
from functools import partial
from pathlib import Path

from shard_tools.documents import read_limited
from shard_tools.manifest import ShardError
from shard_tools.sources import Item, Source
from shard_tools.sources.folders import from_class_folders, list_images, read_file, subfolders
from shard_tools.sources.imagefolder import split_folder

_MAX_LABEL_FILE_BYTES = 16 * 2**20  # LOC_val_solution.csv has 3 MB
_MAX_KIT_BYTES = 4 * 2**20  # of meta.mat, and of what a part of it inflates to; the kit of 2012 has 40 kB
_MAX_KIT_PARTS = 64
_WNID = re.compile(r"n\d{8}")


def open_source(src: Path, split: str, val_labels: Path | None = None) -> Source:
    """One split of ImageNet below `src`, or `src` itself where it holds the class folders.

    val_labels  for a flat val: a wnid or a class number from 0 a line in the order of the sorted file names;
                `<file> <wnid or number>` lines; Kaggle's LOC_val_solution.csv; or the development kit's
                ILSVRC2012_validation_ground_truth.txt with meta.mat beside it
    Raises ShardError where a class cannot be told.
    """
    root = split_folder(src, split)
    folders = _wnids(root)
    classes = _wnids(src / "train") if root != src and (src / "train").is_dir() else folders
    if val_labels is not None:
        return _flat(split, root, classes, val_labels)
    if folders:
        return from_class_folders("imagenet", split, root, folders, classes)
    remedy = (
        "use the source imagefolder"
        if subfolders(root)
        else "give its ground truth with --val-labels, or pack the rest with --split train"
    )
    raise ShardError(f"{root} has no class folders such as n01440764; {remedy}")


def _wnids(folder: Path) -> list[str]:
    return [name for name in subfolders(folder) if _WNID.fullmatch(name)]


def _flat(split: str, root: Path, classes: list[str], val_labels: Path) -> Source:
    listing = list_images(root)
    labels = _labels_by_name([name for name, _ in listing.files], classes, val_labels)
    if not classes:
        classes = sorted({label for label in labels if isinstance(label, str)})
    numbers = {wnid: number for number, wnid in enumerate(classes)}
    items = []
    for (name, size), label in zip(listing.files, labels):
        number = numbers.get(label, -1) if isinstance(label, str) else label
        if not 0 <= number < len(classes):
            raise ShardError(
                f"{val_labels}: {label!r} of {name} is none of the {len(classes)} train classes; check both"
            )
        items.append(Item(name, number, size))
    notes = {"num_ignored": listing.num_ignored}
    return Source("imagenet", split, items, tuple(classes), partial(read_file, os.fspath(root)), notes)


def _labels_by_name(names: list[str], classes: list[str], path: Path) -> list[str | int]:
    """The wnid or number of each image, from any of the known forms of a ground-truth file."""
    lines = _lines(path)
    if lines and lines[0].lower().startswith("imageid,"):
        lines = [line.replace(",", " ") for line in lines[1:]]  # Kaggle: file,wnid x y x y [wnid x y x y ...]
    rows = [line.split() for line in lines]
    if rows and all(len(row) >= 2 for row in rows):
        return _by_file(names, rows, path)
    if any(len(row) != 1 for row in rows):
        raise ShardError(f"{path} mixes lines with and without file names; use one form throughout")
    if len(rows) != len(names):
        raise ShardError(f"{path} has {len(rows)} lines for {len(names)} images; give one line an image")
    labels = [_label(row[0], path) for row in rows]
    return _translated(labels, classes, path) if all(isinstance(label, int) for label in labels) else labels


def _by_file(names: list[str], rows: list[list[str]], path: Path) -> list[str | int]:
    by_stem = {Path(row[0]).stem: _label(row[1], path) for row in rows}
    missing = [name for name in names if Path(name).stem not in by_stem]
    if missing or len(by_stem) != len(rows):
        what = f"says nothing of {len(missing)} images, such as {missing[0]}" if missing else "names a file twice"
        raise ShardError(f"{path} {what}; give one line an image")
    return [by_stem[Path(name).stem] for name in names]


def _translated(labels: list[str | int], classes: list[str], path: Path) -> list[str | int]:
    """Numbers from 0 as they are; numbers from 1 are those of the development kit."""
    if not classes:
        raise ShardError(f"{path} has class numbers, but no train folder tells the wnids; give wnids instead")
    if 0 in labels:
        return labels
    kit = path.with_name("meta.mat")
    wnids = _kit_wnids(kit)[: len(classes)] if kit.is_file() else []
    if sorted(wnids) != classes:
        raise ShardError(
            f"{path} counts classes from 1, as the ILSVRC development kit does in an order of its own; put the kit's"
            " meta.mat beside it, or give wnids"
        )
    return [wnids[int(label) - 1] for label in labels]


def _kit_wnids(path: Path) -> list[str]:
    """The wnids in a MATLAB file in the order of its struct array, which is that of ILSVRC2012_ID.

    Only the text is searched, in the file or its compressed parts; the caller checks the result against the classes.
    """
    try:
        data = read_limited(path, _MAX_KIT_BYTES)
    except (OSError, ValueError) as error:
        raise ShardError(f"{error}; put the development kit's own meta.mat there") from None
    starts = [match.start() for match in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", data)][:_MAX_KIT_PARTS]
    return max([_found_wnids(data), *(_found_wnids(_inflated(data[start:])) for start in starts)], key=len)


def _inflated(data: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(data, _MAX_KIT_BYTES)
    except zlib.error:
        return b""


def _found_wnids(data: bytes) -> list[str]:
    """wnids in 8-bit or 16-bit text, each once, in order."""
    found = re.findall(rb"n(?:\d\0?){8}", data.replace(b"n\0", b"n"))
    return list(dict.fromkeys(wnid.replace(b"\0", b"").decode() for wnid in found))


def _lines(path: Path) -> list[str]:
    try:
        text = read_limited(path, _MAX_LABEL_FILE_BYTES).decode("utf-8-sig")
        return [line.strip() for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} cannot be read as text ({error}); check --val-labels") from None


def _label(text: str, path: Path) -> str | int:
    if _WNID.fullmatch(text):
        return text
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    raise ShardError(f"{path}: {text[:40]!r} is neither a wnid such as n01440764 nor a class number")
