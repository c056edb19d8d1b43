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
    labels  of a multi-label source, one a class: 1 present, -1 present only as difficult, 0 absent; `label` is -1 then
    meta    further facts for the sample's .json
    """

    name: str
    label: int
    size: int
    at: Any = None
    labels: tuple[int, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """One split of a data set, not yet packed.

    items       in an order that depends on the data only
    classes     names of the labels, None for unlabelled data
    read        the bytes of an item; picklable, may raise OSError, or BadImage where it makes an image of a file
    notes       facts for the manifest, such as files passed over; no absolute paths
    side_files  to be written beside the shards
    content     hashes of the images, where their names and sizes would not tell that they changed
    multi_label     every item has `labels`, and none a `label`
    """

    kind: str
    split: str
    items: Sequence[Item]
    classes: tuple[str, ...] | None
    read: Callable[[Item], bytes]
    notes: Mapping[str, Any] = field(default_factory=dict)
    side_files: Mapping[str, bytes] = field(default_factory=dict)
    content: tuple[str, ...] = ()
    multi_label: bool = False
