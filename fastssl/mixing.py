"""Mixing the images of a batch for Un-Mix: a blend of two whole images, or a box of one pasted into the other.

Shen et al., "Un-Mix: rethinking image mixtures for unsupervised visual representation learning", arXiv:2003.05438;
the blend is Mixup (arXiv:1710.09412), the box CutMix (arXiv:1905.04899). The partner of image i is image B - 1 - i of
the same rank, and one lambda and one box serve the whole batch, so that the mixture in the reverse order is the mixed
batch reversed, and its features the reversed features. With an odd batch the image in the middle mixes with itself.

Departure from the authors' code: a mixture is a pure function of (seed, step, rank) instead of a stream's next
numbers, and its box is drawn as fractions, so that crops of several sizes share one draw.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.settings import require

# B images per rank, H W rows and columns, lam the weight of an image beside its partner (lambda is a word of Python)


@dataclass(frozen=True)
class MixingConfig:
    """How mixtures are drawn.

    global_p    probability of the blend; else a box is pasted. The authors' runs of MoCo take 0.5, those of SwAV leave
                0.0, their default, with which whole images are never blended
    beta        lambda ~ Beta(beta, beta); 1 is uniform
    """

    global_p: float = 0.5
    beta: float = 1.0

    def __post_init__(self) -> None:
        require(0.0 <= self.global_p <= 1.0, "method.mixing.global_p", self.global_p, "between 0 and 1")
        require(self.beta > 0.0, "method.mixing.beta", self.beta, "above 0")


@dataclass(frozen=True)
class Mixture:
    """One draw: numbers, not pixels.

    blend   whole images are blended; else a box of the partner is pasted
    lam     lambda as drawn; `mix` returns the one that a loss uses
    centre  of the box, as fractions of rows and columns in [0, 1)
    """

    blend: bool
    lam: float
    centre: tuple[float, float]


def draw_mixture(config: MixingConfig, seed: int, step: int, rank: int | None = None) -> Mixture:
    """The mixture of a step, equal on all ranks, or a rank's own if `rank` is given."""
    # Seeded by text, whose hash keeps neighbouring steps and ranks apart. Python promises what random() gives; that
    # betavariate stays as it is, a test watches.
    generator = random.Random(f"mixture seed={seed} step={step} rank={rank}")
    blend = generator.random() < config.global_p
    centre = (generator.random(), generator.random())
    return Mixture(blend, generator.betavariate(config.beta, config.beta), centre)


def mix(images: Tensor, mixture: Mixture) -> tuple[Tensor, float]:
    """Images (B, C, H, W) mixed with the batch in reverse order, and the lambda to weigh the loss with.

    Where a box is pasted, lambda is 1 minus the share of the image that it covers. The box has the area 1 - lambda as
    drawn, less what rounding and the image's edge cut off. Nothing waits for the device; `images` is left as it is.
    """
    if mixture.blend:
        return torch.lerp(images.flip(0), images, mixture.lam), mixture.lam
    height, width = images.shape[-2:]
    rows, columns = (_span(side, mixture.lam, at) for side, at in zip((height, width), mixture.centre))
    mixed = images.clone()
    mixed[..., rows, columns] = images[..., rows, columns].flip(0)
    return mixed, 1.0 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def _span(side: int, lam: float, centre: float) -> slice:
    """Rows or columns of the box, of 2 * (cut // 2) px: an odd cut loses one, as in the authors' code."""
    middle, half = int(centre * side), int(side * math.sqrt(1.0 - lam)) // 2
    return slice(max(middle - half, 0), min(middle + half, side))
