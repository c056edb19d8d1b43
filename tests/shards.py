"""Writes a small packed split by the contract of `shard_tools.manifest`, without the packer."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from shard_tools.manifest import INDEX_DTYPE, INDEX_NAME, MANIFEST_NAME, Manifest, Shard


def encode(image: Image.Image, suffix: str = "jpg", **options: Any) -> bytes:
    """The image as a file in memory; suffix is jpg, png or bmp, and the options are those of Pillow."""
    file = io.BytesIO()
    if suffix == "jpg":
        image.save(file, "JPEG", **({"quality": 90} | options))
    else:
        image.save(file, suffix.upper(), **options)
    return file.getvalue()


def write_split(
    root: Path,
    files: Sequence[tuple[str, bytes]],
    labels: Sequence[int] | None = None,
    *,
    shard_size: int = 20,
    split: str = "train",
    sizes: Mapping[int, tuple[int, int]] = MappingProxyType({}),
) -> Manifest:
    """Pack `files`, pairs of (suffix, bytes), in their order; what Pillow cannot open is listed as 64 x 64 px.

    sizes   what the index says of some samples, whatever their headers claim
    """
    folder = root / split
    folder.mkdir(parents=True)
    index = np.zeros(len(files), INDEX_DTYPE)
    shards = []
    for first in range(0, len(files), shard_size):
        rows = range(first, min(first + shard_size, len(files)))
        name = f"{split}-{len(shards):06d}.tar"
        _write_tar(folder / name, rows, files, labels)
        with tarfile.open(folder / name) as tar:
            offsets = {member.name: member.offset_data for member in tar}
        for row in rows:
            suffix, payload = files[row]
            width, height = sizes[row] if row in sizes else _size(payload)
            label = -1 if labels is None else labels[row]
            offset = offsets[f"{row:09d}.{suffix}"]
            index[row] = (len(shards), offset, len(payload), label, zlib.crc32(payload), width, height)
        content = (folder / name).read_bytes()
        shards.append(Shard(name, len(content), len(rows), hashlib.sha256(content).hexdigest()))
    np.save(folder / INDEX_NAME, index, allow_pickle=False)
    manifest = Manifest(
        root=folder,
        split=split,
        shards=tuple(shards),
        classes=None if labels is None else tuple(f"class {label}" for label in range(max(labels) + 1)),
        num_samples=len(files),
        census={},
        source={},
        options={},
        index_sha256=hashlib.sha256((folder / INDEX_NAME).read_bytes()).hexdigest(),
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return Manifest.load(root, split)


def _write_tar(
    path: Path, rows: Sequence[int], files: Sequence[tuple[str, bytes]], labels: Sequence[int] | None
) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in rows:
            suffix, payload = files[row]
            members = {suffix: payload}
            if labels is not None:
                members["cls"] = str(labels[row]).encode()
            for kind, content in members.items():
                member = tarfile.TarInfo(f"{row:09d}.{kind}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _size(payload: bytes) -> tuple[int, int]:
    try:
        return Image.open(io.BytesIO(payload)).size
    except OSError:
        return 64, 64
