"""torchvision v2 on uint8 tensors in a DataLoader: decoded by torchvision.io, one decode for all views.

Differs: torchvision's tensor blur has a fixed width, here 13 px (3 sigma at the largest sigma); luma is truncated to a
whole grey where Pillow rounds it, and hue is turned in floating point instead of 8-bit HSV.
"""

import torch
from torchvision import io
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from bench.peers import dataloader, views
from bench.peers.measure import main
from bench.peers.views import VIEWS

BLUR_PX = 13


class AllViews:
    """uint8 (3, H, W) to the list of all its views, normalised."""

    def __init__(self, name):
        self.views = [transform(view) for view in VIEWS[name] for _ in range(view.count)]

    def __call__(self, image):
        return [view(image) for view in self.views]


def transform(view):
    return v2.Compose(
        [
            v2.RandomResizedCrop(view.size, view.scale, antialias=True),
            v2.RandomApply([v2.ColorJitter(*view.jitter)], views.JITTER_P),
            v2.RandomGrayscale(views.GRAYSCALE_P),
            v2.RandomApply([v2.GaussianBlur(BLUR_PX, views.BLUR_SIGMA)], views.BLUR_P),
            v2.RandomHorizontalFlip(views.FLIP_P),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(views.MEAN, views.STD),
        ]
    )


def decode(path):
    return io.decode_image(io.read_file(str(path)), io.ImageReadMode.RGB)


def batches(options):
    return dataloader.batches(ImageFolder(options.folder, AllViews(options.views), loader=decode), options)


def hwc(image):
    return image.permute(1, 2, 0).numpy()


OPERATIONS = {
    "crop_224": lambda image, p: hwc(v2.functional.resized_crop(image, *p[0], [p[1], p[1]], antialias=True)),
    "crop_96": lambda image, p: hwc(v2.functional.resized_crop(image, *p[0], [p[1], p[1]], antialias=True)),
    "brightness": lambda image, p: hwc(v2.ColorJitter(brightness=(p, p))(image)),
    "contrast": lambda image, p: hwc(v2.ColorJitter(contrast=(p, p))(image)),
    "saturation": lambda image, p: hwc(v2.ColorJitter(saturation=(p, p))(image)),
    "hue": lambda image, p: hwc(v2.ColorJitter(hue=(p, p))(image)),
    "grayscale": lambda image, p: hwc(v2.RandomGrayscale(1.0)(image)),
    "blur": lambda image, p: hwc(v2.GaussianBlur(BLUR_PX, (p, p))(image)),
}

if __name__ == "__main__":
    main(batches, "float32 NCHW, normalised", decode, OPERATIONS)
