"""torchvision's transforms on Pillow images in a DataLoader: what the published code of MoCo, SwAV and CLSA runs.

Pixels are Pillow's by definition. The only peer with CLSA's strong pool, written with Pillow as the authors' code has
it: five draws with replacement, each applied with probability one half at a level of 1 to 9 (arXiv:2104.07713).
"""

import random

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision import transforms as T
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as F

from bench.peers import dataloader, views
from bench.peers.measure import main
from bench.peers.views import VIEWS


class Blur:
    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(*views.BLUR_SIGMA)))


class Strong:
    """CLSA's five draws."""

    def __call__(self, image):
        for operation in random.choices(POOL, k=5):
            if random.random() < 0.5:
                image = operation(image, random.randint(1, 9), random.choice((-1, 1)))
        return image


class AllViews:
    """All views of one image, in the order of `View`s."""

    def __init__(self, name):
        self.views = [transform(view) for view in VIEWS[name] for _ in range(view.count)]

    def __call__(self, image):
        return [view(image) for view in self.views]


def transform(view):
    """One view of `View`, from a Pillow image to a normalised tensor."""
    return T.Compose(
        [
            T.RandomResizedCrop(view.size, view.scale),
            T.RandomApply([T.ColorJitter(*view.jitter)], views.JITTER_P),
            T.RandomGrayscale(views.GRAYSCALE_P),
            T.RandomApply([Blur()], views.BLUR_P),
            T.RandomHorizontalFlip(views.FLIP_P),
            *([Strong()] if view.strong else []),
            T.ToTensor(),
            T.Normalize(views.MEAN, views.STD),
        ]
    )


def batches(options):
    return dataloader.batches(ImageFolder(options.folder, AllViews(options.views)), options)


def enhance(kind):
    return lambda image, level, sign: kind(image).enhance(0.05 + 0.09 * level)


def affine(matrix):
    """matrix: (signed level, width, height) -> the six numbers of Pillow's AFFINE; nearest pixel, black outside."""
    return lambda image, level, sign: image.transform(
        image.size, Image.Transform.AFFINE, matrix(level * sign, *image.size), Image.Resampling.NEAREST
    )


POOL = (
    lambda image, level, sign: ImageOps.autocontrast(image),
    enhance(ImageEnhance.Brightness),
    enhance(ImageEnhance.Color),
    enhance(ImageEnhance.Contrast),
    enhance(ImageEnhance.Sharpness),
    lambda image, level, sign: ImageOps.equalize(image),
    lambda image, level, sign: image,
    lambda image, level, sign: ImageOps.posterize(image, 4 + int(0.4 * level)),
    lambda image, level, sign: image.rotate(3 * level * sign),
    lambda image, level, sign: ImageOps.solarize(image, 256 - int(25.6 * level)),
    affine(lambda v, width, height: (1, 0.03 * v, 0, 0, 1, 0)),
    affine(lambda v, width, height: (1, 0, 0, 0.03 * v, 1, 0)),
    affine(lambda v, width, height: (1, 0, int(0.03 * v * width), 0, 1, 0)),
    affine(lambda v, width, height: (1, 0, 0, 0, 1, int(0.03 * v * height))),
)


def decode(path):
    with Image.open(path) as image:
        return image.convert("RGB")


# The parts of `transform` with the parameter in place of the range.
OPERATIONS = {
    "crop_224": lambda image, p: np.asarray(F.resized_crop(image, *p[0], [p[1], p[1]])),
    "crop_96": lambda image, p: np.asarray(F.resized_crop(image, *p[0], [p[1], p[1]])),
    "brightness": lambda image, p: np.asarray(T.ColorJitter(brightness=(p, p))(image)),
    "contrast": lambda image, p: np.asarray(T.ColorJitter(contrast=(p, p))(image)),
    "saturation": lambda image, p: np.asarray(T.ColorJitter(saturation=(p, p))(image)),
    "hue": lambda image, p: np.asarray(T.ColorJitter(hue=(p, p))(image)),
    "grayscale": lambda image, p: np.asarray(T.RandomGrayscale(1.0)(image)),
    "blur": lambda image, p: np.asarray(image.filter(ImageFilter.GaussianBlur(p))),
}

if __name__ == "__main__":
    main(batches, "float32 NCHW, normalised", decode, OPERATIONS)
