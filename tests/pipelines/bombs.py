"""Image files that cost far more than their size: each is small, and says that it is huge or makes a decoder work."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

from PIL import Image

SIDE = 64  # px that the index says of all of them


def jpeg(width: int, height: int) -> bytes:
    """A whole grey JPEG that decodes: with its own Huffman tables every block is two bits, and both are 0."""
    file = io.BytesIO()
    Image.new("L", (SIDE, SIDE), 128).save(file, "JPEG", optimize=True)
    data = bytearray(file.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    num_blocks = -(-width // 8) * -(-height // 8)
    return bytes(data[:-2]) + bytes(num_blocks // 4) + b"\xff\xd9"


def many_scans() -> bytes:
    """Of honest size, but progressive, and its last scan is there 20,000 times."""
    file = io.BytesIO()
    Image.effect_noise((SIDE, SIDE), 50).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 20_000 + b"\xff\xd9"


def png(width: int, height: int, *texts: bytes) -> bytes:
    """A whole black PNG of one bit a pixel, with compressed texts before the pixels."""
    pack, row = zlib.compressobj(), bytes(1 + -(-width // 8))
    pixels = b"".join(pack.compress(row * min(256, height - first)) for first in range(0, height, 256)) + pack.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))]
    packed = {text: zlib.compress(text) for text in set(texts)}
    chunks += [(b"zTXt", b"Comment\0\0" + packed[text]) for text in texts]
    chunks += [(b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )


def webp(width: int, height: int) -> bytes:
    """An animation whose canvas is huge, and its first frame small."""
    file = io.BytesIO()
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "blue")]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    data = bytearray(file.getvalue())
    assert data[12:16] == b"VP8X"
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def bmp(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (SIDE, SIDE)).save(file, "BMP")
    data = bytearray(file.getvalue())
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


BOMBS: dict[str, Callable[[], bytes]] = {
    "JPEG of 20000 x 20000": lambda: jpeg(20_000, 20_000),
    "JPEG of 65500 x 65500": lambda: jpeg(SIDE, SIDE).replace(struct.pack(">HH", SIDE, SIDE), b"\xff\xdc\xff\xdc"),
    "JPEG of 9000 x 9000, within the limit, but of another size than its row": lambda: jpeg(9000, 9000),
    "JPEG of 20,000 scans": many_scans,
    "PNG of 16000 x 16000": lambda: png(16_000, 16_000),
    "PNG with a text of 128 MiB": lambda: png(SIDE, SIDE, bytes(2**27)),
    "PNG with 200 texts of 1 MiB": lambda: png(SIDE, SIDE, *[bytes(2**20)] * 200),
    "WebP of 16384 x 16384": lambda: webp(16_384, 16_384),
    "BMP of 50000 x 50000": lambda: bmp(50_000, 50_000),
    "BMP of 2147483647 x -2147483648": lambda: bmp(2**31 - 1, -(2**31)),
}
