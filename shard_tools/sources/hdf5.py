"""Stamps out of one HDF5 file: a dataset (N, C, H, W) or (N, H, W), with labels and names beside it where it has them.

Read are `images` (or another name), and in the same group `labels` (integers; an attribute `classes` may name them) and
`obj_ids` (any scalars; they become the samples' names).
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools import stamps
from shard_tools.foreign import numbered_classes
from shard_tools.images import BadImage
from shard_tools.manifest import ShardError
from shard_tools.sources import Item, Source

_LOOKS, _LOOK_BYTES = 256, 2**16  # places of a file at which its bytes are hashed


def open_source(src: Path, split: str, dataset: str = "images") -> Source:
    """All stamps of `dataset` in the file `src`, in their order. Raises ShardError where it does not hold any."""
    group = _open(os.fspath(src))
    images = group.get(dataset)
    shape, kind = getattr(images, "shape", None), getattr(getattr(images, "dtype", None), "kind", "")
    if shape is None or kind not in "fiu" or len(shape) not in (3, 4):
        raise ShardError(f"{src} has no numbers {dataset!r} of shape (N, bands, height, width); check --dataset")
    try:
        stamps.check_shape((1, *shape[1:]) if len(shape) == 3 else shape[1:])
    except ValueError as error:
        raise ShardError(f"{src}: a stamp of {dataset!r} cannot be packed: {error}; check --dataset") from None
    num, size = shape[0], 4 * int(np.prod(shape[1:]))
    beside = dataset.rpartition("/")[0]
    labels, classes = _labels(src, group, f"{beside}/labels", num)
    names = _names(src, group, f"{beside}/obj_ids", num)
    items = [Item(f"{dataset}/{name}", label, size, row) for row, (name, label) in enumerate(zip(names, labels))]
    return Source("hdf5", split, items, classes, partial(_read, os.fspath(src), dataset), content=(_hash(src),))


def _labels(src: Path, group: Any, name: str, num: int) -> tuple[list[int], tuple[str, ...] | None]:
    """(a label each, names of the classes); without labels, -1 and None."""
    found = group.get(name)
    if found is None:
        return [-1] * num, None
    if found.shape != (num,) or found.dtype.kind not in "iu":
        raise ShardError(f"{src}: {name} is not one integer for each of {num} stamps; correct or remove it")
    labels = found[:].tolist()
    if num and not -1 <= min(labels) <= max(labels) < 10**6:
        raise ShardError(f"{src}: {name} goes from {min(labels)} to {max(labels)}; classes are counted from 0")
    given = found.attrs.get("classes")
    return labels, numbered_classes(set(labels), None if given is None else tuple(map(_text, given)), src)


def _names(src: Path, group: Any, name: str, num: int) -> list[str]:
    found = group.get(name)
    if found is None:
        return [f"{row:09d}" for row in range(num)]
    if found.shape != (num,):
        raise ShardError(f"{src}: {name} is not one name for each of {num} stamps; correct or remove it")
    return [_text(one) for one in found[:].tolist()]


def _text(value: Any) -> str:
    return str(value, "utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _read(path: str, dataset: str, item: Item) -> bytes:
    try:
        return stamps.encode(_open(path)[dataset][item.at])
    except ValueError as error:
        raise BadImage(f"as a stamp, {error}") from None


# One handle a worker: opening anew for every stamp is slow on network storage. It never locks, for it only reads.
@lru_cache(maxsize=1)
def _open(path: str) -> Any:
    try:
        import h5py
    except ImportError:
        raise ShardError("packing HDF5 needs h5py; run `pip install 'fastssl-train[astronomy]'`") from None
    if not os.path.isfile(path):
        raise ShardError(f"no such file: {path}; give the HDF5 file with the stamps as SRC")
    try:
        return h5py.File(path, "r", locking=False)
    except OSError:  # whose message has several lines
        raise ShardError(f"{path} is damaged, or no HDF5 file; check SRC") from None


def _hash(path: Path) -> str:
    """sha256 of the size and of places all over the file: stamps have one size and often no names, so that another
    file of as many would pass for this one."""
    size = path.stat().st_size
    digest = hashlib.sha256(b"%d" % size)
    with path.open("rb") as file:
        for look in range(_LOOKS):
            file.seek(look * max(0, size - _LOOK_BYTES) // (_LOOKS - 1))
            digest.update(file.read(_LOOK_BYTES))
    return digest.hexdigest()
