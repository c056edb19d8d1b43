"""Trees of image files, as four of the sources have them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shard_tools.census import readable
from shard_tools.manifest import MAX_MEMBER_BYTES, ShardError
from shard_tools.sources import Item, Source

# Files that claim to be images, also of formats that are then refused; all others are passed over and counted.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib"}
    | {".gif", ".tif", ".tiff", ".jp2", ".ppm", ".pgm", ".heic", ".avif"}
)


@dataclass(frozen=True)
class Listing:
    """Image files below a folder as (path within it, bytes), sorted, and the number of other files."""

    files: list[tuple[str, int]]
    num_ignored: int


def list_images(root: Path, suffixes: Collection[str] = IMAGE_SUFFIXES) -> Listing:
    """All files below `root` named as images; links are followed, hidden files and folders passed over."""
    files: list[tuple[str, int]] = []
    num_ignored = 0
    endings = tuple(suffixes)
    for name, size in _walk(os.fspath(root), "", frozenset()):
        if name.lower().endswith(endings):
            files.append((name, size))
        else:
            num_ignored += 1
    return Listing(sorted(files), num_ignored)


def subfolders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted; hidden ones passed over. Raises ShardError if `root` is none."""
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise ShardError(f"{root} cannot be listed ({error.strerror}); give a folder that can be read") from None


def from_class_folders(kind: str, split: str, root: Path, folders: Sequence[str], classes: Sequence[str]) -> Source:
    """The images in root/<folder>/, each folder's name being the class; `classes` gives the numbers.

    Raises ShardError for a folder that is no class.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    if unknown := [name for name in folders if name not in numbers]:
        raise ShardError(
            f"{root} has {len(unknown)} class folders that the train split has not, such as {unknown[0]!r}; rename or"
            " remove them"
        )
    items: list[Item] = []
    num_ignored = 0
    for folder in folders:
        listing = list_images(root / folder)
        items += [Item(f"{folder}/{name}", numbers[folder], size) for name, size in listing.files]
        num_ignored += listing.num_ignored
    names = tuple(map(readable, classes))
    return Source(kind, split, items, names, partial(read_file, os.fspath(root)), {"num_ignored": num_ignored})


def read_file(root: str, item: Item) -> bytes:
    """The item's file; of one that is too large for a member, one byte more than the limit."""
    descriptor = os.open(os.path.join(root, item.name), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):  # a link may lead to a pipe, which waits, or to a device without an end
            raise OSError(errno.EINVAL, "Not a regular file", item.name)
        # told the size, read() need not make room for the largest image that may be
        if status.st_size <= MAX_MEMBER_BYTES:
            return file.readall()
        return file.read(MAX_MEMBER_BYTES + 1)


def _walk(folder: str, below: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """(path, bytes) of every file; `above` are the folders on the way, so that a link cannot lead in a circle."""
    try:
        identity = os.stat(folder)
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ShardError(f"{folder} cannot be listed ({error.strerror}); give a folder that can be read") from None
    key = (identity.st_dev, identity.st_ino)
    if key in above:
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry.path, f"{below}{entry.name}/", above | {key})
        elif entry.is_file():
            yield below + entry.name, entry.stat().st_size
        elif entry.is_symlink():  # broken: a bad file, not a missing one
            yield below + entry.name, 0
