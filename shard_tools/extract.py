"""Samples of shards as files again, under names that are safe whatever the source called them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shard_tools import checksum, disk
from shard_tools.foreign import read_payload
from shard_tools.images import BadImage, inspect
from shard_tools.manifest import Damaged, Manifest, ShardError
from shard_tools.tar import BLOCK, Member

_MAX_NAME = 80  # characters of the original name that are kept


def extract(manifest: Manifest, rows: Sequence[int], out: Path) -> list[Path]:
    """Write the images of `rows` to `out` as `<row>_<original name>.<ext>`; every file lies directly in `out`.

    Raises ShardError for a row that does not exist, a damaged image, and a file that is there already.
    """
    rows_of = manifest.index()
    if wrong := [row for row in rows if not 0 <= row < len(rows_of)]:
        raise ShardError(f"there is no sample {wrong[0]} in {manifest.place}; keys go from 0 to {len(rows_of) - 1}")
    with disk.full_disk_explained(out, "choose another folder"):
        out.mkdir(parents=True, exist_ok=True)
        return [_write(manifest, rows_of, row, out) for row in rows]


def read_image(manifest: Manifest, rows: np.ndarray, row: int) -> bytes:
    """The stored bytes of sample `row`; raises ShardError if they are not those that were packed."""
    entry = rows[row]
    place = Member("", int(entry["offset"]), int(entry["size"]))
    payload = read_payload(manifest.shard_path(int(entry["shard"])), place)
    if checksum.crc32(payload) != entry["crc32"]:
        raise Damaged(f"{manifest.member_name(row)} is damaged (its crc32 differs); restore the shard")
    return payload


def _write(manifest: Manifest, rows: np.ndarray, row: int, out: Path) -> Path:
    payload = read_image(manifest, rows, row)
    path = out / _file_name(manifest, rows, row, payload)
    try:
        with path.open("xb") as file:  # never through a link, never over a file
            file.write(payload)
    except FileExistsError:
        raise ShardError(f"{path} is there already; give another OUT, or remove it") from None
    return path


def _file_name(manifest: Manifest, rows: np.ndarray, row: int, payload: bytes) -> str:
    try:
        extension = inspect(payload).extension
    except BadImage as bad:  # packed as it was with --on-bad keep
        extension = bad.facts.extension if bad.facts else "bin"
    stem = os.path.splitext(original_name(manifest, rows, row).rpartition("/")[2])[0]
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", stem).strip("._-")[:_MAX_NAME]
    return f"{row:09d}_{safe}.{extension}" if safe else f"{row:09d}.{extension}"


def original_name(manifest: Manifest, rows: np.ndarray, row: int) -> str:
    """The "name" of the sample's .json, the second or third member after the image, or ""."""
    entry = rows[row]
    path = manifest.shard_path(int(entry["shard"]))
    offset = int(entry["offset"]) + int(entry["size"])
    offset += -offset % BLOCK
    with path.open("rb") as file:
        for _ in range(2):
            file.seek(offset)
            header = file.read(BLOCK)
            size_field = header[124:135]
            if header[257:262] != b"ustar" or not re.fullmatch(rb"[0-7]{11}", size_field):
                return ""
            size = int(size_field, 8)
            if header[:100].rstrip(b"\0").endswith(b".json") and size <= 2**20:
                return _name_in(file.read(size))
            offset += BLOCK + size + -size % BLOCK
    return ""


def _name_in(document: bytes) -> str:
    try:
        meta = json.loads(document)
    except (ValueError, RecursionError):
        return ""
    name = meta.get("name") if isinstance(meta, dict) else None
    return name if isinstance(name, str) else ""
