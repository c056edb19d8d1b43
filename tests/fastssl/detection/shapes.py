"""Coloured shapes on noise in the layouts of COCO and VOC: red squares and green discs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tests.voc import annotation

KINDS = (("dog", (220, 40, 40)), ("sheep", (40, 220, 40)))  # names that VOC has


def draw_shapes(rng: np.random.Generator, side: int) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """An image of side x side px and its (kind, box in px from 0 with the far sides outside), which do not overlap."""
    noise = rng.integers(0, 120, (side // 4, side // 4, 3), np.uint8)
    image = Image.fromarray(noise).resize((side, side), Image.Resampling.BILINEAR)
    pen, half, found = ImageDraw.Draw(image), side // 2, []
    for column in range(2):
        kind, size = int(rng.integers(2)), int(rng.integers(half // 2, half - 2))
        left, top = column * half + int(rng.integers(0, half - size)), int(rng.integers(0, side - size))
        corners = (left, top, left + size - 1, top + size - 1)
        (pen.rectangle if kind == 0 else pen.ellipse)(corners, fill=KINDS[kind][1])
        found.append((kind, (left, top, left + size, top + size)))
    return image, found


def write_coco(root: Path, parts: dict[str, int], side: int = 64, seed: int = 0) -> Path:
    """root/annotations/instances_PART.json and root/PART/; categories 7 and 3, polygons."""
    rng = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    for part, num in parts.items():
        (root / part).mkdir()
        images, annotations = [], []
        for number in range(num):
            image, shapes = draw_shapes(rng, side)
            image.save(root / part / f"{number:04d}.png")
            images.append({"id": 100 + number, "file_name": f"{number:04d}.png", "width": side, "height": side})
            for kind, (left, top, right, bottom) in shapes:
                box = [left, top, right - left, bottom - top]
                polygon = [[left, top, right, top, right, bottom, left, bottom]]
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": 100 + number, "category_id": (7, 3)[kind], "bbox": box,
                     "area": box[2] * box[3], "iscrowd": 0, "segmentation": polygon}
                )  # fmt: skip
        names = [{"id": 7, "name": "dog"}, {"id": 3, "name": "sheep"}]
        document = {"images": images, "annotations": annotations, "categories": names}
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(document))
    return root


def write_voc(root: Path, parts: dict[str, int], side: int = 64, seed: int = 0) -> Path:
    """root/VOC2007 with the lists of `parts`; boxes counted from 1 with both ends inside."""
    rng, folder, number = np.random.default_rng(seed), root / "VOC2007", 0
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for part, num in parts.items():
        listed = []
        for _ in range(num):
            image, shapes = draw_shapes(rng, side)
            name, number = f"{number:06d}", number + 1
            image.save(folder / "JPEGImages" / f"{name}.jpg", quality=95)
            objects = [(KINDS[kind][0], (b[0] + 1, b[1] + 1, b[2], b[3]), False, False) for kind, b in shapes]
            (folder / "Annotations" / f"{name}.xml").write_text(annotation((side, side), objects))
            listed.append(name)
        (folder / "ImageSets/Main" / f"{part}.txt").write_text("\n".join(listed))
    return root
