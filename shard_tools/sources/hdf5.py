"""Stamps out of one HDF5 file: a dataset (N, C, H, W) or (N, H, W), with labels and names beside it where it has them.

Read are `images` (or another name), and in the same group `labels` (integers; an attribute `classes` may name them) and
`obj_ids` (any scalars; they become the samples' names).

HDF5 can make another file's bytes look like its own (external links, external storage, virtual datasets), and 10^12
stamps of a kilobyte: only what lies in the file itself is packed, and no more stamps than it has bytes.
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

_MAX_CHUNK_BYTES = 128 * 2**20  # unpacked for one stamp; h5py makes chunks of 1 MiB at most
_MAX_NAME_BYTES = 4096
_MAX_CLASSES = 10**6
_LOOKS, _LOOK_BYTES = 256, 2**16  # places of a file at which its bytes are hashed


def open_source(src: Path, split: str, dataset: str = "images") -> Source:
    """All stamps of `dataset` in the file `src`, in their order. Raises ShardError where it does not hold any."""
    group = _open(os.fspath(src))
    images = _found(group, dataset, src)
    shape, kind = getattr(images, "shape", None), getattr(getattr(images, "dtype", None), "kind", "")
    if shape is None or kind not in "fiu" or len(shape) not in (3, 4):
        raise ShardError(f"{src} has no numbers {dataset!r} of shape (N, bands, height, width); check --dataset")
    try:
        stamps.check_shape((1, *shape[1:]) if len(shape) == 3 else shape[1:])
    except ValueError as error:
        raise ShardError(f"{src}: a stamp of {dataset!r} cannot be packed: {error}; check --dataset") from None
    num, size = shape[0], 4 * int(np.prod(shape[1:]))
    if num > src.stat().st_size or _chunk_bytes(images) > _MAX_CHUNK_BYTES:
        raise ShardError(
            f"{src} says that {dataset!r} holds {num} stamps in chunks of {_chunk_bytes(images)} bytes, more than the"
            f" file has room for, or than {_MAX_CHUNK_BYTES} a chunk; write it again in smaller chunks"
        )
    beside = dataset.rpartition("/")[0]
    labels, classes = _labels(src, group, f"{beside}/labels", num)
    names = _names(src, group, f"{beside}/obj_ids", num)
    items = [Item(f"{dataset}/{name}", label, size, row) for row, (name, label) in enumerate(zip(names, labels))]
    return Source("hdf5", split, items, classes, partial(_read, os.fspath(src), dataset), content=(_hash(src),))


def _labels(src: Path, group: Any, name: str, num: int) -> tuple[list[int], tuple[str, ...] | None]:
    """(a label each, names of the classes); without labels, -1 and None."""
    found = _found(group, name, src)
    if found is None:
        return [-1] * num, None
    if _shape(found) != (num,) or found.dtype.kind not in "iu" or _chunk_bytes(found) > _MAX_CHUNK_BYTES:
        raise ShardError(f"{src}: {name} is not one integer for each of {num} stamps; correct or remove it")
    labels = found[:].tolist()
    if num and not -1 <= min(labels) <= max(labels) < 10**6:
        raise ShardError(f"{src}: {name} goes from {min(labels)} to {max(labels)}; classes are counted from 0")
    given = found.attrs.get("classes")
    if given is not None and (np.ndim(given) != 1 or len(given) > _MAX_CLASSES):
        raise ShardError(f"{src}: the classes of {name} are no list of names; correct or remove them")
    return labels, numbered_classes(set(labels), None if given is None else tuple(map(_text, given)), src)


def _names(src: Path, group: Any, name: str, num: int) -> list[str]:
    found = _found(group, name, src)
    if found is None:
        return [f"{row:09d}" for row in range(num)]
    if _shape(found) != (num,) or found.dtype.itemsize > _MAX_NAME_BYTES or _chunk_bytes(found) > _MAX_CHUNK_BYTES:
        raise ShardError(f"{src}: {name} is not one name for each of {num} stamps; correct or remove it")
    names = [_text(one) for one in found[:].tolist()]
    if any(len(one) > _MAX_NAME_BYTES for one in names):
        raise ShardError(f"{src}: {name} has names of more than {_MAX_NAME_BYTES} characters; correct or remove it")
    return names


def _found(group: Any, name: str, src: Path) -> Any:
    """What the file itself holds under `name`, or None. Raises ShardError for what lies in another file."""
    try:
        found = group.get(name)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError):  # links in a ring, damaged objects
        raise ShardError(
            f"{src}: {name[:80]!r} cannot be read; the file is damaged, or its links lead nowhere"
        ) from None
    if found is None:
        return None
    elsewhere = getattr(getattr(found, "file", None), "filename", None) not in (None, group.file.filename)
    if elsewhere or getattr(found, "external", None) or getattr(found, "is_virtual", False):
        raise ShardError(f"{src}: {name!r} lies in another file; copy it into this one, as h5repack does")
    return found


def _shape(found: Any) -> tuple[int, ...] | None:
    return getattr(found, "shape", None)


def _chunk_bytes(found: Any) -> int:
    """What one read unpacks at least, in bytes; 0 for what is not chunked."""
    return int(np.prod([float(side) for side in found.chunks])) * found.dtype.itemsize if found.chunks else 0


def _text(value: Any) -> str:
    return str(value, "utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _read(path: str, dataset: str, item: Item) -> bytes:
    try:
        return stamps.encode(_open(path)[dataset][item.at])
    except ValueError as error:
        raise BadImage(f"as a stamp, {error}") from None
    except (OSError, RuntimeError) as error:  # a damaged chunk, or a filter that is not there
        raise BadImage(f"as HDF5, {str(error).splitlines()[0]}") from None


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
