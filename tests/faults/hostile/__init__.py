"""Files and arguments made to run code, to leave their folder, or to take the machine with them, kind by kind.

Each builder writes the files of one kind below a `Place` and returns what a user would do with them: `Kind.honest` with
a harmless input, which must be accepted, and `Kind.hostile`, which must be refused (or, where `may_pass`, accepted
without harm). Whatever is meant to run code would create `Place.canary`.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.shard_tools.builders import encode, picture, plant

ESCAPE = "\x1b[2J\x1b]0;owned\x07"  # clears a terminal and renames its window
LONG = "x" * 4096
SHARDS, EVALUATE, TRAIN, EXPORT = "shard_tools.cli", "fastssl.evaluate.main", "fastssl.train", "fastssl.export"
CALLS = "tests.faults.calls"


@dataclass(frozen=True)
class Place:
    """root      for the files of a kind
    canary      what no trial may create; `shell` would, run by a shell, and `python` in Python
    out         the one folder that commands are asked to write to
    """

    root: Path
    canary: Path
    out: Path

    @property
    def shell(self) -> str:
        return f"touch {self.canary}"

    @property
    def python(self) -> str:
        return f"__import__('os').system({self.shell!r})"

    def folder(self, name: str) -> Path:
        path = self.root / name
        path.mkdir(parents=True)
        return path


@dataclass(frozen=True)
class Trial:
    """One call of a command; `may_pass` where the input is harmless if it is not run."""

    name: str
    module: str
    arguments: tuple[str, ...]
    may_pass: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """memory and cpu_s are what a refusal may take beyond what the honest input took."""

    honest: Trial
    hostile: list[Trial]
    memory: int = 64 * 10**6
    cpu_s: float = 0.2


class Payload:
    """An object whose pickle runs a shell."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def tar(members: Iterable[tuple[str, bytes] | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for entry in members:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            archive.addfile(info, io.BytesIO(entry[1]))
    return buffer.getvalue()


def object_npy(command: str) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(command)], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def npz(command: str) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.array([Payload(command)], dtype=object))
    return buffer.getvalue()


def postscript(command: str) -> bytes:
    """An image for which Pillow would start Ghostscript, whatever the file is called."""
    return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\n(%pipe%{command}) (w) file\n".encode()


class Call:
    def __init__(self, function: Any, argument: Any) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> Any:
        return self.function, (self.argument,)


def sparse_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def coco_folder(root: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """COCO's layout with one picture of 40x30 px and one box, changed."""
    box = {
        "id": 1,
        "image_id": 1,
        "category_id": 5,
        "bbox": [2, 3, 10, 8],
        "area": 80,
        "iscrowd": 0,
        "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]],
    }
    document = {
        "images": [{"id": 1, "file_name": "0.jpg", "width": 40, "height": 30}],
        "annotations": [box],
        "categories": [{"id": 5, "name": "thing"}],
    }
    change(document)
    plant(
        root,
        {
            "annotations/instances_train2017.json": json.dumps(document).encode(),
            "train2017/0.jpg": encode(picture(1), quality=90),
        },
    )
    return root
