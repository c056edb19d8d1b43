"""kornia in a DataLoader's workers: images decoded by kornia-rs and cropped one by one, all else on batches of a view.

Differs: kornia's crops are not antialiased, and its blur has a fixed width, here 13 px (3 sigma at the largest sigma).
The order of the jitter's operations is drawn once a batch.
"""

import kornia
import kornia.augmentation as K
import torch
from torch import nn
from torchvision.datasets import ImageFolder

from bench.peers import dataloader, views
from bench.peers.measure import main
from bench.peers.views import VIEWS

BLUR_PX = 13


class Crops:
    """float32 (3, H, W) in 0..1 to the list of its crops, not yet augmented."""

    def __init__(self, name):
        self.crops = [
            K.RandomResizedCrop((view.size, view.size), view.scale, align_corners=False, keepdim=True)
            for view in VIEWS[name]
            for _ in range(view.count)
        ]

    def __call__(self, image):
        return [crop(image) for crop in self.crops]


class Collate:
    """A worker's list of (crops, label) to views (B, 3, S, S), augmented as batches, and labels."""

    def __init__(self, name):
        self.chains = [chain(view) for view in VIEWS[name] for _ in range(view.count)]

    def __call__(self, samples):
        crops, labels = zip(*samples)
        return [augment(torch.stack(view)) for augment, view in zip(self.chains, zip(*crops))], torch.tensor(labels)


def chain(view):
    return nn.Sequential(
        K.ColorJitter(*view.jitter, p=views.JITTER_P),
        K.RandomGrayscale(p=views.GRAYSCALE_P),
        K.RandomGaussianBlur((BLUR_PX, BLUR_PX), views.BLUR_SIGMA, p=views.BLUR_P),
        K.RandomHorizontalFlip(p=views.FLIP_P),
        K.Normalize(torch.tensor(views.MEAN), torch.tensor(views.STD)),
    )


def decode(path):
    return kornia.io.load_image(path, kornia.io.ImageLoadType.RGB32)


def batches(options):
    dataset = ImageFolder(options.folder, Crops(options.views), loader=decode)
    return dataloader.batches(dataset, options, Collate(options.views))


def hwc(image):
    return (image * 255).round().byte()[0].permute(1, 2, 0).numpy()


def crop(image, parameter):
    (top, left, height, width), size = parameter
    part = image[None, :, top : top + height, left : left + width]
    # The whole of the part: what RandomResizedCrop does after its slice.
    return hwc(K.RandomResizedCrop((size, size), (1.0, 1.0), (width / height,) * 2, align_corners=False)(part))


OPERATIONS = {
    "crop_224": crop,
    "crop_96": crop,
    "brightness": lambda image, p: hwc(K.ColorJitter(brightness=(p, p))(image[None])),
    "contrast": lambda image, p: hwc(K.ColorJitter(contrast=(p, p))(image[None])),
    "saturation": lambda image, p: hwc(K.ColorJitter(saturation=(p, p))(image[None])),
    "hue": lambda image, p: hwc(K.ColorJitter(hue=(p, p))(image[None])),
    "grayscale": lambda image, p: hwc(K.RandomGrayscale(p=1.0)(image[None])),
    "blur": lambda image, p: hwc(K.RandomGaussianBlur((BLUR_PX, BLUR_PX), (p, p), p=1.0)(image[None])),
}

if __name__ == "__main__":
    main(batches, "float32 NCHW, normalised", decode, OPERATIONS)
