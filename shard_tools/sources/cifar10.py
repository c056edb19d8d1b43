"""CIFAR-10: the python version's pickles (images stored as lossless PNG), or train/<class>/ and test/<class>/ folders.

The pickles are read by an unpickler that builds dicts, lists, bytes, str, int and arrays of bytes, and nothing else: a
pickle can otherwise run any code. (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.)
"""

from __future__ import annotations

import io
import os
import pickle
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shard_tools.manifest import ShardError
from shard_tools.sources import Item, Source, imagefolder

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
    classes = tuple(str(name, "ascii") for name in _field(meta, b"label_names", list, folder / "batches.meta"))
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
    names = [str(name, "ascii", "backslashreplace") for name in _field(document, b"filenames", list, path)]
    if pixels.ndim != 2 or pixels.shape[1] != 3072 or not len(pixels) == len(labels) == len(names):
        raise ShardError(f"{path} does not hold CIFAR-10's 32x32 images; fetch the python version again")
    if not all(isinstance(label, int) and 0 <= label < 10 for label in labels):
        raise ShardError(f"{path} has labels that are no classes of CIFAR-10; fetch the python version again")
    return pixels, labels, names


def _field(document: Any, key: bytes, kind: type, path: object) -> Any:
    if not isinstance(document, dict) or not isinstance(document.get(key), kind):
        raise ShardError(f"{path} has no {key.decode()}; fetch the python version of CIFAR-10 again")
    return document[key]


def read_pickle(path: str) -> Any:
    """The content of a CIFAR pickle; raises ShardError for one that asks for more than plain data and byte arrays."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BATCH_BYTES + 1)
        if len(content) > _MAX_BATCH_BYTES:
            raise ShardError(f"{path} has more than {_MAX_BATCH_BYTES} bytes, so it is no CIFAR-10 batch; check SRC")
        return _plain(_PlainUnpickler(io.BytesIO(content), encoding="bytes").load())
    except ShardError:
        raise
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror}); fetch the python version of CIFAR-10") from None
    except Exception as error:  # a damaged pickle raises whatever the broken opcode happens to hit
        raise ShardError(f"{path} is not a CIFAR-10 pickle ({error}); fetch the python version again") from None


class _PlainUnpickler(pickle.Unpickler):
    """Admits the three names by which NumPy pickles an array, and puts harmless stand-ins in their place."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _Dtype if name == "dtype" else name
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in protocol 2
            return _latin1
        raise ShardError(f"it asks for {module}.{name}, which image data does not need")


class _Dtype:
    """Stands for numpy.dtype; remembers its code."""

    def __init__(self, code: str | bytes, *_flags: object):
        self.code = code if isinstance(code, str) else code.decode("ascii")

    def __setstate__(self, state: object) -> None:
        """Byte order and fields, which an array of bytes does not have."""


class _Array:
    """Stands for an array under construction; `value` is the finished one."""

    value: np.ndarray

    def __init__(self, *_empty: object):
        pass

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, fortran, content = state
        if dtype.code != "u1" or not isinstance(content, bytes):
            raise ShardError("it holds an array of something else than bytes")
        self.value = np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ShardError(f"it holds bytes in the encoding {encoding!r}")
    return text.encode("latin1")


def _plain(document: Any) -> Any:
    """The top level of a batch with its stand-ins replaced by arrays."""
    if not isinstance(document, dict):
        return document
    return {key: value.value if isinstance(value, _Array) else value for key, value in document.items()}
