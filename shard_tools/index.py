"""The side files by which others find samples: DALI's `.idx` v1.2, our `index.npy` and timm's `_info.json`."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shard_tools.manifest import INDEX_DTYPE, Manifest
from shard_tools.manifest import INFO_NAME as INFO_NAME

_NOT_IN_WORDS = re.compile("[^!-~]")

# One component of a sample: extension without dot, byte offset and size of the payload in the tar, member name.
Component = tuple[str, int, int, str]
# One row of index.npy, in the order of INDEX_DTYPE.
Row = tuple[int, int, int, int, int, int, int]


def idx_line(components: Iterable[Component]) -> str:
    """One sample in DALI's index; names only serve DALI's messages, so what would break its parser becomes `_`."""
    return " ".join(f"{ext} {offset} {size} {_word(name)}" for ext, offset, size, name in components)


def idx_bytes(lines: Sequence[str]) -> bytes:
    """A whole `.idx` file, v1.2: a count, then a line a sample (`ext offset size name` for each of its components)."""
    return "".join(f"{line}\n" for line in (f"v1.2 {len(lines)}", *lines)).encode("ascii")


def npy_bytes(rows: np.ndarray) -> bytes:
    """A whole `index.npy` of rows of INDEX_DTYPE, or `labels.npy` of int8."""
    assert rows.dtype in (INDEX_DTYPE, np.int8)
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, rows, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def info_bytes(folder: Path, manifests: Iterable[Manifest]) -> bytes:
    """timm's `_info.json` in `folder` for the splits given; file names are relative to `folder`."""
    splits = {}
    for manifest in sorted(manifests, key=lambda manifest: manifest.split):
        below = manifest.root.relative_to(folder)
        splits[manifest.split] = {
            "name": manifest.split,
            "num_samples": manifest.num_samples,
            "filenames": [(below / shard.name).as_posix() for shard in manifest.shards],
            "shard_lengths": [shard.num_samples for shard in manifest.shards],
            "alt_label": "",
        }
    return (json.dumps({"splits": splits}, indent=1) + "\n").encode()


def _word(name: str) -> str:
    return _NOT_IN_WORDS.sub("_", name)
