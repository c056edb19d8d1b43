"""Patches of the freely licensed photographs that scikit-image and scikit-learn ship: real images without a download.

The label of a patch is its photograph. Train patches lie in the left 60 % of each, test patches in the right 40 %, so
that no pixel is in both. Each patch is lit a little differently: otherwise its mean colour alone tells the photograph
(20-nearest-neighbours on raw pixels: 52 % without, 35 % with it; 14 classes). For trying the tools, not for comparing
methods.

Licences as the docstrings of skimage.data and the README of sklearn's images state them. Left out: photographs without
a stated licence, and two that are nearly uniform (cell, clock).
"""

from __future__ import annotations

import importlib.util
import io
import math
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from shard_tools.manifest import ShardError
from shard_tools.sources import Item, Source

# class name: (package, file in it, licence, origin)
PHOTOS = {
    "astronaut": ("skimage", "astronaut.png", "public domain", "NASA Great Images, https://flic.kr/p/r9qvLn"),
    "brick": ("skimage", "brick.png", "CC0", "https://cc0textures.com/view.php?tex=Bricks25"),
    "camera": ("skimage", "camera.png", "CC0", "Lav Varshney"),
    "cat": ("skimage", "chelsea.png", "CC0", "Stefan van der Walt"),
    "china": (
        "sklearn",
        "china.jpg",
        "CC BY 2.0",
        "danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035",
    ),
    "coffee": ("skimage", "coffee.png", "CC0", "Rachel Michetti, courtesy of Pikolo Espresso Bar"),
    "coins": (
        "skimage",
        "coins.png",
        "no known copyright restrictions",
        "Brooklyn Museum, https://www.brooklynmuseum.org/opencollection/archives/image/51611",
    ),
    "flower": ("sklearn", "flower.jpg", "CC BY 2.0", "vultilion, https://www.flickr.com/photos/vultilion/6056698931"),
    "grass": ("skimage", "grass.png", "CC0", "https://www.deviantart.com/linolafett/art/Grass-01-434853879"),
    "gravel": ("skimage", "gravel.png", "CC0", "https://cc0textures.com/view.php?tex=Gravel04"),
    "hubble": ("skimage", "hubble_deep_field.jpg", "public domain", "NASA, Hubble eXtreme Deep Field, 2012"),
    "retina": ("skimage", "retina.jpg", "CC0", "Mikael Haggstrom, doi:10.15347/wjm/2014.008"),
    "rocket": ("skimage", "rocket.jpg", "public domain", "SpaceX, launch of DSCOVR"),
    "tissue": (
        "skimage",
        "ihc.png",
        "no known copyright restrictions",
        "Center for Microscopy and Molecular Imaging (CMMI)",
    ),
}
TRAIN_SHARE = 0.6  # of each photograph's width
NUM_PATCHES = {"train": 4000, "test": 1000}


def open_source(
    split: str,
    seed: int = 0,
    num_patches: int = 0,
    side: int = 64,
    crop: tuple[int, int] = (48, 128),
    light: float = 0.4,
) -> Source:
    """Square patches at random places, `crop` px wide in the photograph and `side` px as colour JPEG.

    num_patches  0 for the split's default
    light        brightness varies by factors of e^-light to e^light, and each channel by half of that beside it
    Raises ShardError where the packages with the photographs are not installed.
    """
    if split not in NUM_PATCHES:
        raise ShardError(f"the demo has no split {split!r}, only train and test; choose one with --split")
    classes = tuple(sorted(PHOTOS))
    sizes = [_photo(name).size for name in classes]
    key = [seed, list(NUM_PATCHES).index(split)]
    words = np.random.Philox(key=key).random_raw(7 * (num_patches or NUM_PATCHES[split]))
    items = []
    for number, draws in enumerate((words.reshape(-1, 7) / 2.0**64).tolist()):
        label = number % len(classes)
        box = _box(sizes[label], split, crop, draws[:3])
        gains = [math.exp(light * (2 * draws[3] - 1 + draw - 0.5)) for draw in draws[4:]]
        items.append(Item(f"{classes[label]}/{number:05d}.jpg", label, 0, (classes[label], box, side, gains)))
    side_files = {"ATTRIBUTION.txt": attribution().encode()}
    return Source("demo", split, items, classes, _read_patch, {"seed": seed}, side_files)


def _box(size: tuple[int, int], split: str, crop: tuple[int, int], draws: list[float]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a patch inside the split's part of a photograph; `draws` are uniform in [0, 1)."""
    width, height = size
    edge = int(TRAIN_SHARE * width)
    first, last = (0, edge) if split == "train" else (edge, width)
    patch = min(crop[0] + int(draws[0] * (crop[1] + 1 - crop[0])), last - first, height)
    left = first + int(draws[1] * (last - first - patch + 1))
    top = int(draws[2] * (height - patch + 1))
    return left, top, left + patch, top + patch


def attribution() -> str:
    """Who made the photographs and under what terms they may be used."""
    lines = [
        "The images in these shards are patches, cut and resized, of these photographs, as shipped with scikit-image",
        "(skimage) and scikit-learn (sklearn). CC0: https://creativecommons.org/publicdomain/zero/1.0/",
        "CC BY 2.0: https://creativecommons.org/licenses/by/2.0/",
        "",
    ]
    return "\n".join([*lines, *(f"{name}: {'; '.join(facts)}" for name, facts in sorted(PHOTOS.items()))]) + "\n"


def _read_patch(item: Item) -> bytes:
    name, box, side, gains = item.at
    patch = _photo(name).resize((side, side), Image.Resampling.LANCZOS, box=box)
    patch = patch.point([min(255, round(value * gain)) for gain in gains for value in range(256)])
    buffer = io.BytesIO()
    patch.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@lru_cache(maxsize=len(PHOTOS))
def _photo(name: str) -> Image.Image:
    package, file, _, _ = PHOTOS[name]
    below = {"skimage": Path("data"), "sklearn": Path("datasets", "images")}[package]
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / below / file if spec and spec.origin else None
    if path is None or not path.is_file():
        distribution = {"skimage": "scikit-image", "sklearn": "scikit-learn"}[package]
        raise ShardError(f"the demo needs {file} from {distribution}; run `pip install 'fastssl-train[demo]'`")
    with Image.open(path) as image:
        return image.convert("RGB")
