"""What an augmentation is: probabilities and ranges, checked when built. No pixels and no random numbers here."""

from __future__ import annotations

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class AugmentSpec:
    """One chain after the crop: [grayscale] -> jitter -> grayscale -> blur -> solarize -> flip -> strong draws.

    The semantics are torchvision's on Pillow images: jitter runs its four operations in a random order per view,
    contrast pivots on the rounded mean luma, hue turns in HSV, blur is Pillow's `GaussianBlur(radius=sigma)`, and every
    operation rounds to uint8.

    jitter_p        probability that the jitter runs at all
    brightness, contrast, saturation    x: a factor uniform in [max(0, 1 - x), 1 + x]
    hue             x <= 0.5: a shift uniform in [-x, x], a fraction of the colour circle
    grayscale_p     probability of the Rec. 601 luma in all three channels
    grayscale_first puts the grayscale before the jitter (MoCo v1) instead of after it (MoCo v2, SwAV)
    blur_p, blur_sigma      probability, and the range of sigma in pixels of the view
    solarize_p, solarize_threshold      values at or above the threshold are inverted
    flip_p          probability of the horizontal flip
    strong_draws    number of draws from the pool of strong operations (see strong.py; CLSA takes 5)
    stretch, floor  for arrays only, not photographs, instead of all the above: "log10" of the pixels, where those that
                    are not positive count as `floor`; "none" leaves the values
    mean, std       the normalisation of a float output: for pixels in [0, 1], or for an array's values as they are
    Raises ValueError naming the key, the value and the remedy.
    """

    jitter_p: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale_p: float = 0.0
    grayscale_first: bool = False
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0.0
    solarize_threshold: int = 128
    flip_p: float = 0.5
    strong_draws: int = 0
    stretch: str = "none"
    floor: float = 0.1
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for key in ("jitter_p", "grayscale_p", "blur_p", "solarize_p", "flip_p"):
            _require(0.0 <= getattr(self, key) <= 1.0, key, getattr(self, key), "a probability between 0 and 1")
        for key in ("brightness", "contrast", "saturation"):
            _require(getattr(self, key) >= 0.0, key, getattr(self, key), "0 or more")
        _require(0.0 <= self.hue <= 0.5, "hue", self.hue, "a fraction of the colour circle between 0 and 0.5")
        low, high = self.blur_sigma
        _require(0.0 < low <= high, "blur_sigma", self.blur_sigma, "two increasing numbers above 0, in pixels")
        _require(
            0 <= self.solarize_threshold <= 256, "solarize_threshold", self.solarize_threshold, "a value in 0..256"
        )
        _require(0 <= self.strong_draws <= 16, "strong_draws", self.strong_draws, "a number of draws from 0 to 16")
        _require(self.stretch in ("none", "log10"), "stretch", self.stretch, "none or log10")
        _require(self.floor > 0.0, "floor", self.floor, "above 0")
        _require(min(self.std, default=0.0) > 0.0, "std", self.std, "numbers above 0, one a channel")
        _require(len(self.mean) == len(self.std), "mean", self.mean, f"as many numbers as std has, {len(self.std)}")


def _require(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"augment.{key} is {value!r}, but must be {remedy}")
