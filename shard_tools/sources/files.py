"""Any tree of images, without labels."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from shard_tools.sources import Item, Source
from shard_tools.sources.folders import list_images, read_file


def open_source(src: Path, split: str) -> Source:
    """All images below `src`, whatever its folders are called; `split` only names the result."""
    listing = list_images(src)
    items = [Item(name, -1, size) for name, size in listing.files]
    read = partial(read_file, os.fspath(src))
    return Source("files", split, items, None, read, {"num_ignored": listing.num_ignored})
