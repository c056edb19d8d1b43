"""What the header of an image file claims, read without decoding and without trusting it: enough to refuse a bomb."""

from __future__ import annotations

import io

from PIL import Image

from shard_tools.manifest import MAX_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow's names of those that are read; its other readers are never asked
MAX_SCANS = 500  # of a progressive JPEG, each a pass over all pixels; a crafted file has thousands, and takes hours
MAX_TEXTS = 32  # compressed chunks of a PNG; each may grow to a MiB, which Pillow keeps

_SOI, _SOS, _EOI = 0xD8, 0xDA, 0xD9
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..15 but for tables
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_ALONE = frozenset((0x01, *range(0xD0, 0xD8)))  # markers without a length
_PNG = b"\x89PNG\r\n\x1a\n"


class Refused(ValueError):
    """The file is not to be decoded; the message says why."""


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) in px as stored, by a microsecond or two of reading. Raises Refused.

    Refused is what begins as no JPEG, PNG, WebP or BMP, and what claims more work than its pixels are worth.
    """
    if data[:2] == b"\xff\xd8":
        size = _jpeg_size(data)
    elif data[:8] == _PNG:
        size = _png_size(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        size = _webp_size(data)
    elif data[:2] == b"BM":
        size = _bmp_size(data)
    else:
        raise Refused("it is no JPEG, PNG, WebP or BMP")
    width, height = size or _size_by_pillow(data)
    if not 0 < width * height <= MAX_PIXELS:
        raise Refused(f"its header claims {width} x {height} px, and {MAX_PIXELS} px are the most")
    return width, height


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """From the frame's header; None where it does not come as every encoder writes it."""
    place, end = 2, len(data) - 9
    while place < end and data[place] == 0xFF:
        marker = data[place + 1]
        if marker in _FRAMES:
            if marker in _PROGRESSIVE and data.count(b"\xff\xda") > MAX_SCANS:
                raise Refused(f"it has more than {MAX_SCANS} scans")
            return data[place + 7] << 8 | data[place + 8], data[place + 5] << 8 | data[place + 6]
        if marker in (0xFF, _SOS, _EOI, _SOI, 0):
            return None
        place += 2 if marker in _ALONE else 2 + (data[place + 2] << 8 | data[place + 3])
    return None


def _png_size(data: bytes) -> tuple[int, int] | None:
    if data[12:16] != b"IHDR":
        return None
    if sum(map(data.count, (b"zTXt", b"iTXt", b"iCCP"))) > MAX_TEXTS:
        raise Refused(f"it has more than {MAX_TEXTS} compressed texts")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """Of the canvas. Pillow would take memory for it before it says how large it is."""
    kind, first = data[12:16], int.from_bytes(data[20:25], "little")
    if kind == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == b"VP8L" and first & 0xFF == 0x2F:
        return 1 + (first >> 8 & 0x3FFF), 1 + (first >> 22 & 0x3FFF)
    if kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    raise Refused("its WebP header is damaged")


def _bmp_size(data: bytes) -> tuple[int, int] | None:
    if int.from_bytes(data[14:18], "little") == 12:  # the header of OS/2
        return int.from_bytes(data[18:20], "little"), int.from_bytes(data[20:22], "little")
    width, height = (int.from_bytes(data[at : at + 4], "little", signed=True) for at in (18, 22))
    return max(0, width), abs(height)  # rows of a negative height go from the top to the bottom


def _size_by_pillow(data: bytes) -> tuple[int, int]:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS).size
    except Image.DecompressionBombError:
        raise Refused(f"its header claims more than {MAX_PIXELS} px") from None
    except Exception:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise Refused("its header is damaged") from None
