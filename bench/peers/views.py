"""The views that every peer makes, written for the peers alone; a test holds them against fastssl's configs.

The chain of a view: crop -> jitter in a random order (p 0.8) -> grayscale (p 0.2) -> blur with a sigma of 0.1 to 2 px
(p 0.5) -> horizontal flip (p 0.5) [-> five strong draws] -> normalisation with ImageNet's mean and deviation.
"""

from dataclasses import dataclass

JITTER_P = 0.8
GRAYSCALE_P = 0.2
BLUR_P = 0.5
BLUR_SIGMA = (0.1, 2.0)
FLIP_P = 0.5
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class View:
    """`count` views of `size` px; scale: area fractions; jitter: brightness, contrast, saturation, hue (a fraction of
    the colour circle); strong: with CLSA's draws after the flip."""

    size: int
    count: int
    scale: tuple[float, float]
    jitter: tuple[float, float, float, float]
    strong: bool = False


_MOCO_JITTER = (0.4, 0.4, 0.4, 0.1)  # Chen et al., arXiv:2003.04297
_SWAV_JITTER = (0.8, 0.8, 0.8, 0.2)  # Caron et al., arXiv:2006.09882
_CLSA_SCALES = {224: (0.2, 1.0), 192: (0.172, 0.86), 160: (0.143, 0.715), 128: (0.114, 0.571), 96: (0.086, 0.429)}

VIEWS = {
    "moco_v2": (View(224, 2, (0.2, 1.0), _MOCO_JITTER),),
    "swav": (View(224, 2, (0.14, 1.0), _SWAV_JITTER), View(96, 6, (0.05, 0.14), _SWAV_JITTER)),
    # Wang and Qi, arXiv:2104.07713: one key, five weak and five strong queries of falling size.
    "clsa_multi": (
        View(224, 1, (0.2, 1.0), _MOCO_JITTER),
        *(View(size, 1, scale, _MOCO_JITTER) for size, scale in _CLSA_SCALES.items()),
        *(View(size, 1, scale, _MOCO_JITTER, strong=True) for size, scale in _CLSA_SCALES.items()),
    ),
}
