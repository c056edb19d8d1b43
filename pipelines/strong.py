"""The strong augmentation of CLSA: draws from a pool of fourteen operations, each at one of nine levels.

Wang and Qi, arXiv:2104.07713 (section 3.2), with the magnitudes of the authors' code, which are FixMatch's list
(Sohn et al., arXiv:2001.07685) under RandAugment (Cubuk et al., arXiv:1909.13719): an operation is drawn uniformly with
replacement, a level v uniformly from 1..9, and the operation is applied with probability one half. Pillow's semantics;
the geometric operations take the nearest pixel, black outside the image, and go either way with the same probability.

Places (x, y) are those of pixel centres, in px from the upper left corner of the image.
"""

from __future__ import annotations

POOL = (
    "auto_contrast",
    "brightness",
    "saturation",  # Pillow's and the papers' "Color"
    "contrast",
    "equalize",
    "identity",
    "posterize",
    "rotate",
    "sharpness",
    "shear_x",
    "shear_y",
    "solarize",
    "translate_x",
    "translate_y",
)
LEVELS = 9
APPLIED_P = 0.5


def enhance_factor(level: int) -> float:
    """brightness, saturation, contrast, sharpness: the factor of Pillow's ImageEnhance; always below 1."""
    return 0.05 + 0.09 * level


def posterize_bits(level: int) -> int:
    """Bits kept of each value: 4, 4, 5, 5, 6, 6, 6, 7, 7."""
    return (4, 4, 5, 5, 6, 6, 6, 7, 7)[level - 1]


def rotate_deg(level: int, sign: int) -> float:
    """Counter-clockwise, about the centre of the image."""
    return float(3 * level * sign)


def shear(level: int, sign: int) -> float:
    """An output pixel (x, y) shows the input at (x + shear * y, y) for shear_x, (x, y + shear * x) for shear_y."""
    return 0.03 * level * sign


def solarize_threshold(level: int) -> int:
    """Values at or above it are inverted: 231, 205, ..., 26."""
    return 256 - int(25.6 * level)


def translate_px(level: int, sign: int, size: int) -> int:
    """An output pixel (x, y) shows the input at (x + px, y) for translate_x, (x, y + px) for translate_y."""
    return int(0.03 * level * size) * sign
