"""Stamps out of a folder of FITS files, without labels: each holds one, in the first of its HDUs that has an image."""

from __future__ import annotations

import gzip
import io
import os
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from shard_tools import stamps
from shard_tools.images import BadImage
from shard_tools.manifest import MAX_MEMBER_BYTES, ShardError
from shard_tools.sources import Item, Source
from shard_tools.sources.folders import list_images, read_file

SUFFIXES = frozenset(end + packed for end in (".fits", ".fit", ".fts", ".fits.fz") for packed in ("", ".gz"))
_MAX_UNITS = 64  # HDUs that are looked at: an empty one costs its maker 2,880 bytes, and astropy a millisecond
_MAX_HEADER_BYTES = 36 * 2880  # before the first END; 1,296 cards
_TOO_MANY = re.compile(rb"(?:NAXIS   |ZNAXIS  |TFIELDS )= *[0-9]{4}")  # astropy counts up to what is claimed
_END = b"END".ljust(80)
_GZIP = b"\x1f\x8b"


def open_source(src: Path, split: str) -> Source:
    """All FITS files below `src`; stamps (bands, height, width), or (height, width) of one band."""
    _astropy()
    listing = list_images(src, SUFFIXES)
    items = [Item(name, -1, size) for name, size in listing.files]
    return Source("fits", split, items, None, partial(_read, os.fspath(src)), {"num_ignored": listing.num_ignored})


def _read(root: str, item: Item) -> bytes:
    data = read_file(root, item)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # headers of real surveys bend the standard in many ways
        warnings.filterwarnings("error", ".*truncated")  # but a file that was cut is only a warning, too
        try:
            if data.startswith(_GZIP):
                with gzip.open(io.BytesIO(data)) as packed:
                    data = packed.read(MAX_MEMBER_BYTES + 1)
            if len(data) > MAX_MEMBER_BYTES:
                raise BadImage(f"the file is larger than {MAX_MEMBER_BYTES} bytes")
            if _TOO_MANY.search(data):
                raise BadImage("as FITS, it claims more than 999 axes or columns")
            if data.find(_END, 0, _MAX_HEADER_BYTES) < 0:
                raise BadImage("as FITS, its first header has no end")
            with _astropy().open(io.BytesIO(data), memmap=False) as units:
                return _first_image(units)
        except (BadImage, ShardError):
            raise
        except Exception as error:  # whatever a damaged header or heap makes astropy raise
            raise BadImage(f"as FITS, {str(error).splitlines()[0] if str(error) else type(error).__name__}") from None


def _first_image(units: Any) -> bytes:
    for number, unit in enumerate(units):
        if number == _MAX_UNITS:
            break
        shape = unit.shape if unit.is_image else ()
        if not shape:
            continue
        try:
            stamps.check_shape((1, *shape) if len(shape) == 2 else shape)  # before a claim of any size is unpacked
            return stamps.encode(unit.data)
        except ValueError as error:
            raise BadImage(f"as a stamp, {error}") from None
    raise BadImage(f"none of its first {_MAX_UNITS} HDUs holds an image")


def _astropy() -> Any:
    try:
        from astropy.io import fits
    except ImportError:
        raise ShardError("packing FITS needs astropy; run `pip install 'fastssl-train[astronomy]'`") from None
    return fits
