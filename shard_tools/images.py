"""What an image file really is: a strict decode, its facts, and the re-encoding that a resize asks for.

Formats are told by content: JPEG, PNG, WebP and BMP, the four that Pillow and DALI decode alike, and stamps, which are
arrays of floats (see stamps.py). EXIF orientation is
reported but never applied, as torchvision and timm do not apply it.
"""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from shard_tools import headers, stamps
from shard_tools.manifest import MAX_MEMBER_BYTES, MAX_PIXELS, ShardError

# Pillow's name of a format -> extension of the member. MPO is a JPEG with further pictures behind the first.
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp"}
FORMAT_NAMES = {"jpg": "jpeg", "png": "png", "webp": "webp", "bmp": "bmp", "npy": "npy"}
_ORIENTATION = 0x0112  # EXIF tag

_FOREIGN_MAGIC = {  # formats that users do have and that DALI does not read as Pillow does
    b"GIF8": "GIF",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF": "PDF",
    b"\0\0\0\x0cjP": "JPEG 2000",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """What a header says. width and height in px as stored; mode is Pillow's; orientation is the EXIF tag or None.

    bands   of a stamp; 0 for a photograph
    """

    extension: str
    width: int
    height: int
    mode: str
    orientation: int | None = None
    corrupt_exif: bool = False
    bands: int = 0


@dataclass(frozen=True, slots=True)
class Resize:
    """Shrink images: longest side to `max_side` px or shortest to `short_side` px (one of them; 0 is off), as JPEG."""

    max_side: int = 0
    short_side: int = 0
    quality: int = 90

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Target (width, height); the same as given where the image is small enough: never enlarged."""
        scale = min(1.0, self.max_side / max(width, height) if self.max_side else self.short_side / min(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image as it goes into a shard. `original` are the facts of the source, `facts` those of `payload`."""

    payload: bytes
    facts: Facts
    original: Facts


class BadImage(ValueError):
    """The bytes are not a whole image of an allowed format; `facts` is set where at least the header is good."""

    def __init__(self, reason: str, facts: Facts | None = None):
        super().__init__(reason)
        self.facts = facts


def inspect(data: bytes) -> Facts:
    """Facts of an image that decodes to the last line; raises BadImage."""
    return prepare(data, None).original


def prepare(data: bytes, resize: Resize | None) -> Prepared:
    """Decode strictly; keep the bytes, or re-encode where `resize` shrinks the image or it has 16 bits a channel.

    Grey PNGs of 16 bits become 8-bit PNGs (value / 257, rounded): Pillow would clip where DALI scales.
    Raises BadImage, and ShardError where a stamp is to be shrunk.
    """
    if data.startswith(stamps.MAGIC):
        if resize:
            raise ShardError("--max-side and --short-side shrink photographs, but these are stamps; leave them out")
        facts = _inspect_stamp(data)
        return Prepared(data, facts, facts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image, facts = _open(data, caught)
        size = image.size
        target = resize.size(*size) if resize else size
        if target == size:
            # Every code of a JPEG is read all the same, and nothing behind the codes can fail; others have no draft.
            image.draft(None, (max(1, size[0] // 8), max(1, size[1] // 8)))
        try:
            image.load()
        except Exception as error:  # whatever a decoder raises on damaged bytes
            raise BadImage(_reason(error), facts) from None
        if image.mode.startswith("I"):
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
            if target == size:
                return Prepared(_encode(image, "PNG"), _with(image, "png"), facts)
        if target == size:
            return Prepared(data, facts, facts)
        if image.mode not in ("L", "RGB"):
            image = image.convert("RGB")
        image = image.resize(target, Image.Resampling.LANCZOS)
        assert resize is not None
        return Prepared(_encode(image, "JPEG", quality=resize.quality), _with(image, "jpg"), facts)


def _inspect_stamp(data: bytes) -> Facts:
    """No BadImage of a stamp carries facts, so that none is ever kept: its NaN would spread over a whole model."""
    try:
        pixels = stamps.decode(data)
    except ValueError as error:
        raise BadImage(f"as a stamp, {error}") from None
    if not np.isfinite(pixels).all():
        raise BadImage(f"{np.count_nonzero(~np.isfinite(pixels))} of its pixels are NaN or infinite")
    bands, height, width = pixels.shape
    return Facts("npy", width, height, f"{bands} x float32", bands=bands)


def _open(data: bytes, caught: list[warnings.WarningMessage]) -> tuple[Image.Image, Facts]:
    """The image with only its header read, within the limits of size."""
    if not data:
        raise BadImage("the file is empty")
    if len(data) > MAX_MEMBER_BYTES:
        raise BadImage(f"the file is larger than {MAX_MEMBER_BYTES} bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=headers.FORMATS)
    except UnidentifiedImageError:
        raise BadImage(_what_else(data)) from None
    except Exception as error:
        raise BadImage(_reason(error)) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} px are more than {MAX_PIXELS}, a decompression bomb")
    if width < 1 or height < 1 or image.format not in EXTENSIONS:
        raise BadImage(f"a {image.format} of {width}x{height} px")
    try:
        if headers.size_of(data) != image.size:
            raise BadImage("its header has two sizes")
    except headers.Refused as refused:
        raise BadImage(str(refused)) from None
    orientation, corrupt = _exif(image, caught)
    return image, Facts(EXTENSIONS[image.format], width, height, image.mode, orientation, corrupt)


def _exif(image: Image.Image, caught: list[warnings.WarningMessage]) -> tuple[int | None, bool]:
    """(orientation tag or None, whether the EXIF block is damaged); `caught` holds Pillow's warnings so far."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow lets struct, syntax and value errors of a damaged block through
        return None, True
    corrupt = any("exif" in str(warning.message).lower() for warning in caught)
    return orientation if isinstance(orientation, int) else None, corrupt


def _encode(image: Image.Image, form: str, **options: int) -> bytes:
    image.info = {}  # or a comment or profile of the source would come along
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _with(image: Image.Image, extension: str) -> Facts:
    return Facts(extension, image.width, image.height, image.mode)


def _what_else(data: bytes) -> str:
    for magic, name in _FOREIGN_MAGIC.items():
        if data.startswith(magic):
            return f"a {name} file, not one of jpeg, png, webp, bmp"
    return "not an image, or its header is damaged"


def _reason(error: Exception) -> str:
    """A decoder's message without memory addresses, which would differ from run to run."""
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MAX_PIXELS} px, a decompression bomb"
    return re.sub(r"<.*? at 0x[0-9a-f]+>", "the file", str(error)) or type(error).__name__
