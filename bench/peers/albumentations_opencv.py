"""albumentations on OpenCV images in a DataLoader: decoded once by OpenCV, one Compose a view.

Differs: OpenCV has no antialiased bilinear interpolation; crops that shrink take INTER_AREA, its nearest relative, by
`area_for_downscale`, the others INTER_LINEAR. Hue is turned in OpenCV's 8-bit HSV, which has 180 steps.
"""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or it asks the network for a newer release at import

import albumentations as A
import cv2
from albumentations.pytorch import ToTensorV2
from torchvision.datasets import ImageFolder

from bench.peers import dataloader, views
from bench.peers.measure import main
from bench.peers.views import VIEWS

cv2.setNumThreads(0)  # the workers are the threads


class AllViews:
    def __init__(self, name):
        self.views = [transform(view) for view in VIEWS[name] for _ in range(view.count)]

    def __call__(self, image):
        return [view(image=image)["image"] for view in self.views]


def transform(view):
    b, c, s, h = view.jitter
    return A.Compose(
        [
            A.RandomResizedCrop((view.size, view.size), view.scale, area_for_downscale="image"),
            A.ColorJitter((1 - b, 1 + b), (1 - c, 1 + c), (1 - s, 1 + s), (-h, h), p=views.JITTER_P),
            A.ToGray(p=views.GRAYSCALE_P),
            A.GaussianBlur(blur_limit=0, sigma_limit=views.BLUR_SIGMA, p=views.BLUR_P),
            A.HorizontalFlip(p=views.FLIP_P),
            A.Normalize(views.MEAN, views.STD),
            ToTensorV2(),
        ]
    )


def decode(path):
    return cv2.imread(str(path), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)


def batches(options):
    return dataloader.batches(ImageFolder(options.folder, AllViews(options.views), loader=decode), options)


def crop(image, parameter):
    (top, left, height, width), size = parameter
    part = A.Crop(left, top, left + width, top + height)(image=image)["image"]
    return A.Resize(size, size, area_for_downscale="image")(image=part)["image"]


def jitter(**ranges):
    still = {"brightness": (1, 1), "contrast": (1, 1), "saturation": (1, 1), "hue": (0, 0)}
    return A.ColorJitter(**{**still, **ranges}, p=1.0)


OPERATIONS = {
    "crop_224": crop,
    "crop_96": crop,
    "brightness": lambda image, p: jitter(brightness=(p, p))(image=image)["image"],
    "contrast": lambda image, p: jitter(contrast=(p, p))(image=image)["image"],
    "saturation": lambda image, p: jitter(saturation=(p, p))(image=image)["image"],
    "hue": lambda image, p: jitter(hue=(p, p))(image=image)["image"],
    "grayscale": lambda image, p: A.ToGray(p=1.0)(image=image)["image"],
    "blur": lambda image, p: A.GaussianBlur(blur_limit=0, sigma_limit=(p, p), p=1.0)(image=image)["image"],
}

if __name__ == "__main__":
    main(batches, "float32 NCHW, normalised", decode, OPERATIONS)
