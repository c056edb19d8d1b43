"""lightly's own MoCoV2Transform and SwaVTransform, with their defaults, over an ImageFolder in a DataLoader.

Differs: flips before the colours instead of after them, which changes nothing in distribution.
"""

import numpy as np
from lightly.transforms import GaussianBlur, MoCoV2Transform, SwaVTransform
from torchvision.datasets import ImageFolder

from bench.peers import dataloader
from bench.peers.measure import main
from bench.peers.torchvision_pillow import OPERATIONS, decode

TRANSFORMS = {"moco_v2": MoCoV2Transform, "swav": SwaVTransform}


def batches(options):
    return dataloader.batches(ImageFolder(options.folder, TRANSFORMS[options.views]()), options)


# All but the blur are torchvision's on Pillow images.
BLUR = {"blur": lambda image, sigma: np.asarray(GaussianBlur(prob=1.0, sigmas=(sigma, sigma))(image))}

if __name__ == "__main__":
    main(batches, "float32 NCHW, normalised", decode, {**OPERATIONS, **BLUR})
