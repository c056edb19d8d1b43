"""Patches of the freely licensed photographs that scikit-image and scikit-learn ship: real images without a download.

The label of a patch is its photograph. Train patches lie in the left 60 % of each, test patches in the right 40 %, so
that no pixel is in both. Small and easy: for trying the tools, not for comparing methods. Licences as the docstrings of
skimage.data and the README of sklearn's images state them; photographs without a stated licence are left out.
"""

from __future__ import annotations

import importlib.util
import io
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
    "cell": ("skimage", "cell.png", "CC0", "Paul Mueller and others, doi:10.1364/OE.26.010729"),
    "china": (
        "sklearn",
        "china.jpg",
        "CC BY 2.0",
        "danielbuechele, https://www.flickr.com/photos/danielbuechele/6061409035",
    ),
    "clock": ("skimage", "clock_motion.png", "public domain", "Stefan van der Walt"),
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
    split: str, seed: int = 0, num_patches: int = 0, side: int = 64, crop: tuple[int, int] = (48, 128)
) -> Source:
    """Square patches at random places, `crop` px wide in the photograph and `side` px as colour JPEG.

    num_patches  0 for the split's default
    Raises ShardError where the packages with the photographs are not installed.
    """
    if split not in NUM_PATCHES:
        raise ShardError(f"the demo has no split {split!r}, only train and test; choose one with --split")
    classes = tuple(sorted(PHOTOS))
    sizes = [_photo(name).size for name in classes]
    draws = np.random.Philox(key=[seed, list(NUM_PATCHES).index(split)]).random_raw(
        3 * (num_patches or NUM_PATCHES[split])
    )
    items = []
    for number, (a, b, c) in enumerate((draws.reshape(-1, 3) / 2.0**64).tolist()):
        label = number % len(classes)
        width, height = sizes[label]
        first, last = (0, int(TRAIN_SHARE * width)) if split == "train" else (int(TRAIN_SHARE * width), width)
        patch = min(crop[0] + int(a * (crop[1] + 1 - crop[0])), last - first, height)
        left = first + int(b * (last - first - patch + 1))
        top = int(c * (height - patch + 1))
        box = (left, top, left + patch, top + patch)
        items.append(Item(f"{classes[label]}/{number:05d}.jpg", label, 0, (classes[label], box, side)))
    side_files = {"ATTRIBUTION.txt": attribution().encode()}
    return Source("demo", split, items, classes, _read_patch, {"seed": seed}, side_files)


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
    name, box, side = item.at
    patch = _photo(name).resize((side, side), Image.Resampling.LANCZOS, box=box)
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
