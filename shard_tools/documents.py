"""Text and JSON of unknown origin, read up to a limit and no further: the size of a file costs its maker nothing."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

MAX_LIST_BYTES = 256 * 2**20  # of names, one a line: 14 million of them have 200 MB


def read_limited(path: Path, most: int) -> bytes:
    """A whole file of `most` bytes at most. Raises OSError, and ValueError for a larger one, or a pipe or device."""
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no regular file")
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size <= most and len(content := file.read(most + 1)) <= most:
            return content
    raise ValueError(f"{path} has more than {most} bytes")


def read_json(path: Path, most: int) -> Any:
    """The JSON of a file of `most` bytes at most. Raises OSError, and ValueError for what is none, or nests deeply."""
    content = read_limited(path, most)
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{path} nests too deeply") from None
