"""CIFAR-10: the python version's pickles (images stored as lossless PNG), or train/<class>/ and test/<class>/ folders.

The pickles are read as plain data (plain_pickle.py): a pickle can otherwise run any code.
(Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.)
"""

from __future__ import annotations

import io
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shard_tools.manifest import ShardError
from shard_tools.sources import Item, Source, imagefolder, plain_pickle

_FOLDER = "cifar-10-batches-py"
_BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_MAX_BATCH_BYTES = 64 * 2**20  # the files have 31 MB


def open_source(src: Path, split: str) -> Source:
    """The train or test split from the folder of pickles (or the one above it), or from class folders."""
    if split not in _BATCHES:
        raise ShardError(f"CIFAR-10 has no split {split!r}, only train and test; choose one with --split")
    for folder in (src, src / _FOLDER):
        if (folder / _BATCHES[split][0]).is_file():
            return _from_pickles(folder, split)
    return imagefolder.open_source(src, split, "cifar10")


def splits(src: Path) -> list[str]:
    """The splits that the folder holds, as pickles or as class folders."""
    for folder in (src, src / _FOLDER):
        if present := [split for split, batches in _BATCHES.items() if (folder / batches[0]).is_file()]:
            return present
    return imagefolder.splits(src, tuple(_BATCHES))


def _from_pickles(folder: Path, split: str) -> Source:
    meta = read_pickle(os.fspath(folder / "batches.meta"))
    facts = folder / "batches.meta"
    classes = tuple(_text(name, facts) for name in _field(meta, b"label_names", list, facts))
    if len(classes) != 10:
        raise ShardError(f"{facts} names {len(classes)} classes, not 10; fetch the python version again")
    items = []
    for batch in _BATCHES[split]:
        _, labels, names = _batch(os.fspath(folder / batch))
        for row, (label, name) in enumerate(zip(labels, names)):
            items.append(Item(f"{batch}/{classes[label]}/{name}", label, 0, (batch, row)))
    return Source("cifar10", split, items, classes, partial(_read_png, os.fspath(folder)))


def _read_png(folder: str, item: Item) -> bytes:
    batch, row = item.at
    pixels, _, _ = _batch(os.path.join(folder, batch))
    buffer = io.BytesIO()
    planes = pixels[row].reshape(3, 32, 32)  # red, green, blue planes, each row by row
    Image.fromarray(np.ascontiguousarray(planes.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


@lru_cache(maxsize=8)
def _batch(path: str) -> tuple[np.ndarray, list[int], list[str]]:
    """(pixels (N, 3072) uint8, labels, file names) of one pickle."""
    document = read_pickle(path)
    pixels = _field(document, b"data", np.ndarray, path)
    labels = _field(document, b"labels", list, path)
    names = [_text(name, path) for name in _field(document, b"filenames", list, path)]
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or not len(pixels) == len(labels) == len(names):
        raise ShardError(f"{path} does not hold CIFAR-10's 32x32 images; fetch the python version again")
    if not all(isinstance(label, int) and 0 <= label < 10 for label in labels):
        raise ShardError(f"{path} has labels that are no classes of CIFAR-10; fetch the python version again")
    return pixels, labels, names


def _field(document: Any, key: bytes, kind: type, path: object) -> Any:
    if not isinstance(document, dict) or not isinstance(document.get(key), kind):
        raise ShardError(f"{path} has no {key.decode()}; fetch the python version of CIFAR-10 again")
    return document[key]


def _text(name: object, path: object) -> str:
    if not isinstance(name, str | bytes):
        raise ShardError(f"{path} has a name that is no text; fetch the python version of CIFAR-10 again")
    return name if isinstance(name, str) else str(name, "ascii", "backslashreplace")


def read_pickle(path: str) -> Any:
    """The content of a CIFAR pickle; raises ShardError for one that asks for more than plain data and byte arrays."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BATCH_BYTES + 1)
        if len(content) > _MAX_BATCH_BYTES:
            raise ShardError(f"{path} has more than {_MAX_BATCH_BYTES} bytes, so it is no CIFAR-10 batch; check SRC")
        return plain_pickle.loads(content)
    except ShardError:
        raise
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror}); fetch the python version of CIFAR-10") from None
    except Exception as error:  # a damaged pickle raises whatever the broken opcode happens to hit
        raise ShardError(f"{path} is not a CIFAR-10 pickle ({error}); fetch the python version again") from None
