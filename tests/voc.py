"""A VOCdevkit/VOC2007 in miniature: the same folders, lists and XML as the real one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.sources.voc07 import CLASSES
from tests.shard_tools.builders import encode, picture, plant

SIZE = (40, 30)


def annotation(size: tuple[int, int], objects: Sequence[tuple[str, Sequence[Any], bool, bool]]) -> str:
    """VOC's XML of (class, (xmin, ymin, xmax, ymax), difficult, truncated)."""
    blocks = "".join(
        f"<object>\n<name>{name}</name><pose>Left</pose>\n<truncated>{truncated:d}</truncated>"
        f"<difficult>{difficult:d}</difficult>\n<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin>"
        f"<xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox>\n</object>\n"
        for name, box, difficult, truncated in objects
    )
    width, height = size
    return (
        f"<annotation>\n<folder>VOC2007</folder><source><database>tests</database></source>\n"
        f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>\n"
        f"<segmented>0</segmented>\n{blocks}</annotation>\n"
    )


def devkit(root: Path, train: int = 6, val: int = 3, test: int = 4, seed: int = 0) -> Path:
    """One to three objects an image, a third of them difficult; classes in turn, so that all have as many images."""
    rng = np.random.default_rng(seed)
    names = [f"{number:06d}" for number in range(1, train + val + test + 1)]
    files: dict[str, bytes] = {}
    for number, name in enumerate(names):
        objects = []
        for other in range(int(rng.integers(1, 4))):
            left, top = int(rng.integers(1, 20)), int(rng.integers(1, 15))
            box = (left, top, left + int(rng.integers(0, 20)), top + int(rng.integers(0, 15)))
            objects.append((CLASSES[(3 * number + other) % len(CLASSES)], box, bool(rng.integers(3) == 0), False))
        files[f"JPEGImages/{name}.jpg"] = encode(picture(number, SIZE), quality=90)
        files[f"Annotations/{name}.xml"] = annotation(SIZE, objects).encode()
    lists: Mapping[str, list[str]] = {
        "train": names[:train],
        "val": names[train : train + val],
        "trainval": names[: train + val],
        "test": names[train + val :],
    }
    for split, listed in lists.items():
        files[f"ImageSets/Main/{split}.txt"] = "".join(f"{name}\n" for name in listed).encode()
    return plant(root, files)
