"""A process that trains on damaged images: every batch must be whole, whatever they hold.

python -m tests.faults.fuzz_images FOLDER STATUS BACKEND=COUNT...
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path

from PIL import Image

from pipelines.augment import AugmentSpec
from pipelines.loader import Loader
from pipelines.views import ViewSpec
from shard_tools.headers import Refused, size_of
from shard_tools.images import BadImage, inspect
from tests.faults.memory import resident_mb
from tests.faults.mutations import mutated
from tests.shard_tools.builders import encode, picture
from tests.shards import write_split

BATCH, DAMAGED = 8, 64  # damaged images in a split
GOOD = 7  # for each of them, so that eight replacements in a row are never all bad
SLOW_S = 1.0  # CPU seconds that one batch may take beyond what a good one takes
MOST_PX = 2**21  # of a damaged header that the index is made to agree with
AUGMENT = AugmentSpec(jitter_p=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale_p=0.2, blur_p=0.5)
SPECS = [ViewSpec("query", 32, count=2, augment=AUGMENT)]


def seeds() -> list[bytes]:
    """Whole files of every kind that training reads."""
    photo = picture(1, (96, 64))
    jpegs = [encode(photo, quality=85, subsampling=k) for k in range(3)]
    jpegs += [encode(photo, progressive=True), encode(photo.convert("L")), encode(photo.convert("CMYK"))]
    jpegs += [encode(photo, restart_marker_blocks=2), encode(photo, keep_rgb=True)]
    pngs = [encode(photo.convert(mode), "PNG") for mode in ("RGB", "P", "L", "RGBA", "1", "I;16")]
    webps = [encode(photo, "WEBP"), encode(photo, "WEBP", lossless=True)]
    webps.append(encode(photo, "WEBP", save_all=True, append_images=[picture(2, (96, 64))]))
    return jpegs * 3 + pngs + webps + [encode(photo, "BMP"), encode(photo.convert("P"), "BMP")]


def main(folder: Path, backend: str, count: int, status: int) -> None:
    files = seeds()
    good = [("jpg", encode(picture(i, (96, 64)))) for i in range(GOOD)]
    for begin in range(0, count, DAMAGED):
        os.pwrite(status, b"%-8s%08d" % (backend.encode(), begin), 0)
        damaged, sizes = [], {}
        for seed in range(begin, min(begin + DAMAGED, count)):
            rng = random.Random(seed)
            original = rng.choice(files)
            damaged.append(mutated(original, rng) or b"x")
            sizes[(GOOD + 1) * len(damaged) - 1] = agreed_size(damaged[-1], rng)
        mixed = [file for data in damaged for file in (*good, ("jpg", data))]
        shutil.rmtree(folder / "train", ignore_errors=True)
        train(write_split(folder, mixed, sizes=sizes), backend)
        judge(damaged)


def agreed_size(data: bytes, rng: random.Random) -> tuple[int, int]:
    """What the index says: half of the time what the damaged header claims, so that it is decoded."""
    try:
        width, height = size_of(data)
    except Refused:
        return 96, 64
    return (width, height) if width * height <= MOST_PX and rng.random() < 0.5 else (96, 64)


def train(manifest, backend: str) -> None:
    options = {"batch_size": BATCH, "seed": 1, "threads": 2, "on_bad": "replace", "backend": backend}
    with Loader(manifest, SPECS, **options) as loader:
        batches, before = loader.batches(), time.process_time()
        for _ in range(loader.steps_per_epoch):
            batch = next(batches)
            assert all(view.shape == (BATCH, 3, 32, 32) for view in batch.views["query"])
            now = time.process_time()
            if now - before > SLOW_S + 0.5:
                sys.exit(f"a batch took {now - before:.1f} s of CPU; it replaced {batch.replaced}")
            before = now


def judge(files: list[bytes]) -> None:
    """As `pack` does."""
    for data in files:
        started = time.process_time()
        with contextlib.suppress(BadImage):
            inspect(data)
        if time.process_time() - started > SLOW_S:
            sys.exit("inspect took more than a second")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, 16 * 2**30))
    Image.open(io.BytesIO(seeds()[0])).load()
    for word in sys.argv[3:]:
        backend, _, count = word.partition("=")
        main(Path(sys.argv[1]), backend, int(count), os.open(sys.argv[2], os.O_WRONLY))
    print(round(resident_mb("VmHWM")))
