"""Stamps: small float images of several bands, stored as NumPy files of one strict form.

A member `%09d.npy` holds a C-contiguous little-endian float32 array (bands, height, width) in NumPy's format 1.0. The
header is written and read here: NumPy pads it differently from version to version, and its own reader evaluates it.
"""

from __future__ import annotations

import math
import re

import numpy as np
import numpy.typing as npt

from shard_tools.manifest import MAX_BANDS, MAX_MEMBER_BYTES

MAGIC = b"\x93NUMPY\x01\x00"
_HEADER_BYTES = 128  # with magic and length: room for any shape, and a multiple of 64, as the format asks
_HEADER = re.compile(rb"\{'descr': '<f4', 'fortran_order': False, 'shape': \((\d{1,9}), (\d{1,9}), (\d{1,9})\), \} *\n")


def encode(pixels: npt.ArrayLike) -> bytes:
    """The file of a stamp (C, H, W), or (H, W) of one band; the same pixels give the same bytes on any machine.

    Raises ValueError for other dimensions, or if it would be too large for a member.
    """
    values = np.asarray(pixels)
    values = values[None] if values.ndim == 2 else values
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused when decoded
        values = np.ascontiguousarray(values, dtype="<f4")
    check_shape(values.shape)
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {values.shape}, }}".encode()
    padding = b" " * (_HEADER_BYTES - len(MAGIC) - 2 - len(header) - 1)
    length = (_HEADER_BYTES - len(MAGIC) - 2).to_bytes(2, "little")
    return b"".join((MAGIC, length, header, padding, b"\n", values.tobytes()))


def decode(data: bytes) -> npt.NDArray[np.float32]:
    """The pixels (C, H, W) of a stamp's file, read-only and sharing its memory.

    Raises ValueError, saying what is wrong, unless the file is exactly of the form above. Values are not looked at.
    """
    if not data.startswith(MAGIC):
        raise ValueError("it is no NumPy file of format 1.0")
    start = 10 + int.from_bytes(data[8:10], "little")
    header = _HEADER.fullmatch(data[10:start])
    if not header:
        raise ValueError("its header does not say C-contiguous float32 ('<f4') of three dimensions")
    bands, height, width = (int(number) for number in header.groups())
    check_shape((bands, height, width))
    if len(data) != start + 4 * bands * height * width:
        raise ValueError(f"it has {len(data)} bytes, but its header says {start + 4 * bands * height * width}")
    return np.frombuffer(data, "<f4", offset=start).reshape(bands, height, width)


def check_shape(shape: tuple[int, ...]) -> None:
    """Raises ValueError unless `shape` is (C, H, W) of a stamp that fits a member."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"its shape is {shape}, not (bands, height, width)")
    if shape[0] > MAX_BANDS:
        raise ValueError(f"it has {shape[0]} bands, more than {MAX_BANDS}; the first axis must be the bands")
    if 4 * math.prod(shape) + _HEADER_BYTES > MAX_MEMBER_BYTES:
        raise ValueError(f"its shape is {shape}, of more than {MAX_MEMBER_BYTES} bytes")
