"""The ceiling: libjpeg-turbo alone, files to RGB pixels in threads that release the GIL, and nothing made of them.

The accurate inverse DCT and the smooth upsampling of chroma, which are libjpeg-turbo's defaults and Pillow's.
Differs: makes no views.
"""

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import simplejpeg
from PIL import Image

from bench.peers.measure import main


def decode(path: Path):
    data = path.read_bytes()
    if not simplejpeg.is_jpeg(data):
        with Image.open(path) as image:
            return image.convert("RGB")
    return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False)


def decode_all(paths: list[Path]) -> None:
    for path in paths:
        decode(path)


def batches(options):
    files = sorted(path for path in options.folder.glob("*/*") if path.is_file())
    shuffled = itertools.chain.from_iterable(random.sample(files, len(files)) for _ in itertools.count())
    with ThreadPoolExecutor(options.workers) as threads:

        def submit():
            paths = list(itertools.islice(shuffled, options.batch))
            return [threads.submit(decode_all, paths[i : i + 4]) for i in range(0, len(paths), 4)]

        ahead = [submit(), submit()]
        while True:
            for part in ahead.pop(0):
                part.result()
            ahead.append(submit())
            yield None


if __name__ == "__main__":
    main(batches, "uint8 images of their own sizes")
