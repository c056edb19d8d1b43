"""PASCAL VOC (Everingham et al., IJCV 2010): the lists of ImageSets/Main, and what Annotations say of each image.

An image has every class of which it shows an object. An object too hard to judge is marked difficult; a class of which
an image shows difficult objects only is neither present nor absent (labels.npy: -1), and the devkit's evaluation passes
over such an image.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from shard_tools.documents import read_limited
from shard_tools.manifest import ShardError
from shard_tools.sources import Item, Source
from shard_tools.sources.folders import read_file

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
SPLITS = ("train", "val", "trainval", "test")

_MAX_XML_BYTES = 2**17  # VOC's own are below 20 kB
_MAX_LIST_BYTES = 2**20  # the longest of 2012 has 200 kB
_MAX_SIDE = 10**6


def splits(src: Path) -> list[str]:
    """The lists of SRC that are there: train, val, their union trainval, test."""
    return [name for name in SPLITS if _list_path(src, name).is_file()]


def open_source(src: Path, split: str) -> Source:
    """The images of one list, in its order. Raises ShardError for what is not VOC's layout, and for a bad annotation.

    A sample's .json has `labels`, and `annotation`: the annotated image's size in px, and its objects with class, box
    [xmin, ymin, xmax, ymax] (in px, counted from 1, both ends inside, as VOC has them), difficult and truncated.
    """
    names = annotation_names(src, split)
    images = src / "JPEGImages"
    items = []
    for name in names:
        annotation = read_annotation(src / "Annotations" / f"{name}.xml")
        items.append(Item(f"{name}.jpg", -1, _size(images / f"{name}.jpg"), None, labels_of(annotation),
                          {"annotation": annotation}))  # fmt: skip
    content = hashlib.sha256(json.dumps([item.meta for item in items]).encode()).hexdigest()
    read = partial(read_file, os.fspath(images))
    return Source("voc07", split, items, CLASSES, read, content=(content,), multi_label=True)


def annotation_names(src: Path, split: str) -> list[str]:
    """The names that one of SRC's lists holds, without extension. Raises ShardError for a list that is none."""
    path = _list_path(src, split)
    try:
        names = read_limited(path, _MAX_LIST_BYTES).decode("ascii").split()
    except FileNotFoundError:
        found = f"only {', '.join(splits(src))}" if splits(src) else "and no other list; SRC is .../VOCdevkit/VOC2007"
        raise ShardError(f"{src} has no ImageSets/Main/{split}.txt, {found}; choose a split with --split") from None
    except (OSError, ValueError) as error:
        raise ShardError(f"{path} cannot be read as a list of names ({error}); restore it") from None
    if wrong := [name for name in names if not re.fullmatch(r"\w{1,64}", name, re.ASCII)]:
        raise ShardError(f"{path} lists {wrong[0][:40]!r}, which is no name of an image; restore it")
    if len(set(names)) != len(names):
        raise ShardError(f"{path} lists an image twice; restore it")
    return names


def labels_of(annotation: dict[str, Any]) -> tuple[int, ...]:
    """One label a class: 1 if an object is not difficult, -1 if all are, 0 if there is none."""
    labels = dict.fromkeys(CLASSES, 0)
    for entry in annotation["objects"]:
        if not entry["difficult"]:
            labels[entry["class"]] = 1
        elif not labels[entry["class"]]:
            labels[entry["class"]] = -1
    return tuple(labels.values())


def read_annotation(path: Path) -> dict[str, Any]:
    """{"size": [width, height], "objects": [{class, box, difficult, truncated}, ...]} of one XML file.

    Raises ShardError for a file that is missing, larger than 128 KiB, no XML, has a document type (and so might have
    entities), an unknown class, or a box that is none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_XML_BYTES + 1)
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror}); SRC must hold all of the devkit's parts") from None
    if len(data) > _MAX_XML_BYTES:
        raise ShardError(f"{path} is larger than {_MAX_XML_BYTES} bytes, so no annotation; restore it")
    try:
        root = ElementTree.fromstring(data, ElementTree.XMLParser(target=_PlainBuilder()))
        size = root.find("size")
        return {
            "size": [_number(size, "width"), _number(size, "height")],
            "objects": [_object(node) for node in root.findall("object")],
        }
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        # LookupError: an encoding that Python does not know
        raise ShardError(f"{path} is no VOC annotation ({error}); restore it") from None


class _PlainBuilder(ElementTree.TreeBuilder):
    """Builds the tree of a document without a document type: only there can entities be declared."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it declares a document type")


def _object(node: ElementTree.Element) -> dict[str, Any]:
    name = (node.findtext("name") or "").strip()
    if name not in CLASSES:
        raise ValueError(f"{name[:40]!r} is none of VOC's 20 classes")
    box = node.find("bndbox")
    xmin, ymin, xmax, ymax = (_number(box, side) for side in ("xmin", "ymin", "xmax", "ymax"))
    if not (xmin <= xmax and ymin <= ymax):
        raise ValueError(f"the box {[xmin, ymin, xmax, ymax]} of a {name} is empty")
    flags = {key: _flag(node, key) for key in ("difficult", "truncated")}
    return {"class": name, "box": [xmin, ymin, xmax, ymax], **flags}


def _number(node: ElementTree.Element | None, key: str) -> int | float:
    """Whole in VOC 2007; a few boxes of VOC 2012 have fractions."""
    text = "" if node is None else (node.findtext(key) or "").strip()
    value = float(text) if re.fullmatch(r"-?\d{1,9}(\.\d{1,20})?", text) else math.nan
    if not 0 <= value <= _MAX_SIDE:
        raise ValueError(f"its {key} is {text[:40]!r}")
    return int(value) if value.is_integer() else value


def _flag(node: ElementTree.Element, key: str) -> bool:
    text = (node.findtext(key) or "0").strip()
    if text not in ("0", "1"):
        raise ValueError(f"its {key} is {text[:40]!r}")
    return text == "1"


def _list_path(src: Path, split: str) -> Path:
    return src / "ImageSets" / "Main" / f"{split}.txt"


def _size(path: Path) -> int:
    """Bytes of the image; 0 where it is missing, which is told when it is packed."""
    return path.stat().st_size if path.is_file() else 0
