"""Class folders of images, with or without split folders above them: SRC/<class>/... or SRC/<split>/<class>/..."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shard_tools.manifest import ShardError
from shard_tools.sources import Source
from shard_tools.sources.folders import from_class_folders, subfolders

SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test")


def open_source(src: Path, split: str, kind: str = "imagefolder") -> Source:
    """Classes are the folder names, sorted; those of SRC/train for every split, so that labels agree.

    Raises ShardError where SRC has no class folders, or split folders without this one.
    """
    root = split_folder(src, split)
    folders = subfolders(root)
    if not folders:
        raise ShardError(f"{root} has no class folders; for images without labels use `shard_tools pack files`")
    train = src / "train"
    classes = subfolders(train) if root != src and train.is_dir() else folders
    return from_class_folders(kind, split, root, folders, classes)


def splits(src: Path, known: Sequence[str] = SPLIT_NAMES) -> list[str]:
    """The folders of SRC that are named as splits, in the order of `known`."""
    present = subfolders(src)
    return [name for name in known if name in present]


def split_folder(src: Path, split: str) -> Path:
    """SRC/<split> where SRC has split folders, else SRC itself."""
    names = subfolders(src)
    if split in names:
        return src / split
    if present := [name for name in names if name.lower() in SPLIT_NAMES]:
        raise ShardError(f"{src} has no split {split!r}, only {', '.join(present)}; choose one with --split")
    return src
