"""Image files to pixels by Pillow, which decides what is an image and what is not."""

from __future__ import annotations

import io
import re

from PIL import Image

from pipelines.backends import DecodeError, Job
from shard_tools.headers import FORMATS


def decode(job: Job, i: int) -> Image.Image:
    """Sample i as `Image.open(...).convert("RGB")` gives it; an EXIF orientation is not applied. Raises DecodeError."""
    try:
        image = Image.open(io.BytesIO(job.images[i]), formats=FORMATS)
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = re.sub(r" ?<.*? at 0x[0-9a-f]+>", "", str(error))  # an address differs from run to run
        fault = f"{job.names[i]} cannot be decoded ({reason}); pack the data again with --on-bad quarantine"
        raise DecodeError({i: fault}) from error


def other_size(job: Job, i: int, image: Image.Image) -> DecodeError:
    """For a crop of sample i that does not lie within its image."""
    fault = (
        f"{job.names[i]} is {image.width} x {image.height} px, but the index of its shards says otherwise;"
        " pack the data again, or run `shard_tools index`"
    )
    return DecodeError({i: fault})
