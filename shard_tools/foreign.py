"""Samples of a WebDataset shard that someone else may have written: members grouped by key, hostile ones refused.

The key of a member is its path up to the first dot of the file name, as webdataset and DALI have it; the rest is its
extension. Only by reading offsets and sizes, never by extracting.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shard_tools.manifest import MAX_MEMBER_BYTES, ShardError
from shard_tools.tar import Member, members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
_STAMP = "npy"  # an image only where the sample has no other: beside a photograph it is something else about it
IMAGES = (*IMAGE_EXTENSIONS, _STAMP)
_MAX_JSON_BYTES = 2**20
_MAX_LABEL = 10**6
_MAX_LABEL_BYTES = 21
_NUMBER = re.compile(rb"\d{1,20}")
_REPACK = "re-pack the shard"


@dataclass(slots=True)
class Sample:
    """The members of one key by extension (lower case); `meta` is the content of .json, {} without one.

    crc32   of those images that were read on the way, by extension
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    label: int = -1
    meta: dict[str, Any] = field(default_factory=dict)
    crc32: dict[str, int] = field(default_factory=dict)

    @property
    def extension(self) -> str:
        return next(extension for extension in IMAGES if extension in self.members)

    @property
    def image(self) -> Member:
        return self.members[self.extension]


# (sample, extension, member, most) -> the first `most` bytes of a member that is being passed
Note = Callable[[Sample, str, Member, int], bytes]


def read_samples(path: Path) -> list[Sample]:
    """The samples of one tar in order, each with exactly one image, and its label from .cls or .json.

    Raises ShardError, naming shard and member, for what readers would mistake or a hostile archive might hold: links
    and devices, paths that leave the folder, keys that reappear, doubled members, dots in keys, samples without an
    image or with a label that is no integer.
    """
    with path.open("rb") as file:

        def note(sample: Sample, extension: str, member: Member, most: int) -> bytes:
            return os.pread(file.fileno(), min(member.size, most), member.offset)

        return samples_of(path, members(path), note)


def samples_of(path: Path, members: Iterable[Member], note: Note) -> list[Sample]:
    """As `read_samples`, of members from elsewhere, each of which is noted before the next one is asked for."""
    samples = list(_grouped(path, members, note))
    for sample in samples:
        _check_image(path, sample)
        if "cls" not in sample.members:
            sample.label = _label_in(sample.meta)
    return samples


def read_payload(path: Path, member: Member) -> bytes:
    """The bytes of a member; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, member.size, member.offset)
    finally:
        os.close(descriptor)


def _grouped(path: Path, members: Iterable[Member], note: Note) -> Iterator[Sample]:
    seen: set[str] = set()
    sample: Sample | None = None
    for member in members:
        _check_path(path, member)
        folder, _, file_name = member.name.rpartition("/")
        stem, _, extension = file_name.partition(".")
        if not stem or not extension or (stem.startswith("__") and stem.endswith("__")):
            continue  # hidden, without an extension, or webdataset's own notes: no reader takes these for samples
        key = f"{folder}/{stem}" if folder else stem
        if sample is None or key != sample.key:
            if sample is not None:
                yield sample
            if key in seen:
                raise ShardError(f"{path}: the members of {key!r} are not together; {_REPACK}")
            seen.add(key)
            sample = Sample(key)
        extension = extension.lower()
        if extension in sample.members:
            raise ShardError(f"{path}: {member.name!r} is there twice; {_REPACK}")
        sample.members[extension] = member
        if extension in IMAGES:
            note(sample, extension, member, 0)
        elif extension == "json":
            sample.meta = _meta(path, member, note(sample, extension, member, _MAX_JSON_BYTES))
        elif extension == "cls":
            sample.label = _class_number(path, member, note(sample, extension, member, _MAX_LABEL_BYTES))
    if sample is not None:
        yield sample


def _check_path(path: Path, member: Member) -> None:
    if member.name.startswith("/") or (".." in member.name and ".." in member.name.split("/")):
        raise ShardError(f"{path}: the member {member.name!r} points out of its folder; {_REPACK} without it")


def _check_image(path: Path, sample: Sample) -> None:
    images = [extension for extension in IMAGE_EXTENSIONS if extension in sample.members]
    if len(images) > 1:
        raise ShardError(f"{path}: the sample {sample.key!r} has {len(images)} images ({', '.join(images)}); {_REPACK}")
    if images or _STAMP in sample.members:
        return
    dotted = [e for e in sample.members if "." in e and e.rpartition(".")[2] in IMAGE_EXTENSIONS]
    if dotted:
        name = sample.members[dotted[0]].name
        raise ShardError(f"{path}: {name!r} has a dot in its key, which readers take for an extension; {_REPACK}")
    raise ShardError(
        f"{path}: the sample {sample.key!r} has no image ({', '.join(IMAGE_EXTENSIONS)}, {_STAMP}); {_REPACK}"
    )


def _meta(path: Path, member: Member, content: bytes) -> dict[str, Any]:
    if member.size > _MAX_JSON_BYTES:
        raise ShardError(f"{path}: {member.name!r} has more than {_MAX_JSON_BYTES} bytes; {_REPACK}")
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise ShardError(f"{path}: {member.name!r} is not valid JSON; {_REPACK}") from None
    return document if isinstance(document, dict) else {}


def _class_number(path: Path, member: Member, content: bytes) -> int:
    number = content.strip()
    if not _NUMBER.fullmatch(number) or int(number) >= _MAX_LABEL:
        raise ShardError(f"{path}: {member.name!r} holds {number!r}, not a class number; {_REPACK}")
    return int(number)


def _label_in(meta: dict[str, Any]) -> int:
    """The integer of "label" or "cls"; -1 where there is none."""
    for key in ("label", "cls"):
        value = meta.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_LABEL:
            return value
    return -1


def check_size(path: Path, sample: Sample) -> None:
    """Raise ShardError for an image that is empty or too large to be one."""
    if not 0 < sample.image.size <= MAX_MEMBER_BYTES:
        raise ShardError(f"{path}: {sample.image.name!r} has {sample.image.size} bytes; {_REPACK} without it")


def numbered_classes(labels: set[int], names: tuple[str, ...] | None, where: object) -> tuple[str, ...] | None:
    """The classes of foreign labels: `names` if given, else "0", "1", ...; None where no sample has a label.

    Raises ShardError where some samples have one and others not, or a label has no name.
    """
    if labels == {-1}:
        return None
    if -1 in labels:
        raise ShardError(f"{where}: some samples have a label and others have none; give all of them one, or none")
    if names is not None and max(labels) >= len(names):
        raise ShardError(f"{where}: the label {max(labels)} has no name among {len(names)} classes; check --classes")
    return names or tuple(str(number) for number in range(max(labels) + 1))
