"""Where images come from: each source lists its items in a fixed order and reads one item's bytes in a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Item:
    """One image to be.

    name   path within the source, `/` between folders; as the file system gives it (surrogate escapes)
    label  class number, -1 where the source has no classes
    size   bytes as stored, 0 where unknown
    at     where the source's `read` finds it, if not under its name
    """

    name: str
    label: int
    size: int
    at: Any = None


@dataclass(frozen=True)
class Source:
    """One split of a data set, not yet packed.

    items       in an order that depends on the data only
    classes     names of the labels, None for unlabelled data
    read        the bytes of an item; picklable, may raise OSError, or BadImage where it makes an image of a file
    notes       facts for the manifest, such as files passed over; no absolute paths
    side_files  to be written beside the shards
    content     hashes of the images, where their names and sizes would not tell that they changed
    """

    kind: str
    split: str
    items: Sequence[Item]
    classes: tuple[str, ...] | None
    read: Callable[[Item], bytes]
    notes: Mapping[str, Any] = field(default_factory=dict)
    side_files: Mapping[str, bytes] = field(default_factory=dict)
    content: tuple[str, ...] = ()
