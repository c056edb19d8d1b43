"""What a view is: its role in the method, its crop and its augmentation. Pure data, checked when built."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipelines.augment import AugmentSpec

CROPS = ("random_resized", "center", "turned")


@dataclass(frozen=True)
class ViewSpec:
    """`count` views of one recipe, drawn independently of each other.

    role    the name under which a method finds them: `Batch.views[role]` is a list of tensors (B, C, S, S), of all
            specs with that role in their order
    size    S, side of the square output in px
    crop    "random_resized": area fraction uniform in `scale`, aspect log-uniform in `ratio` (width / height), ten
            tries, then the centre, resized by antialiased bilinear interpolation (torchvision's RandomResizedCrop);
            "center": the shorter side to `resize` px by the same interpolation, then the central `size` x `size` px;
            "turned": the image turned about its centre, then a window of `size` x `size` px near the centre (stamps of
            galaxies, which have no up and keep their scale)
    resize  for crop "center" only: the shorter side in px before the crop, at least `size`
    turn_deg    for crop "turned" only: the angle is uniform in [-turn_deg, turn_deg)
    shift_px    for crop "turned" only: the window is moved by whole px, uniform in -shift_px..shift_px along each axis
    shows   "pixels", or "positive": 1 where a pixel of the same window is above 0, else 0 (for arrays only)
    same_as     another role, whose first view's random numbers this one repeats; "" draws its own
    Raises ValueError naming the key, the value and the remedy.
    """

    role: str
    size: int
    count: int = 1
    crop: str = "random_resized"
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    resize: int = 0
    turn_deg: float = 180.0
    shift_px: int = 0
    shows: str = "pixels"
    same_as: str = ""
    augment: AugmentSpec = field(default_factory=AugmentSpec)

    def __post_init__(self) -> None:
        _require(self.role.isidentifier(), "role", self.role, "a name such as query, key, global or local")
        _require(1 <= self.size <= 4096, "size", self.size, "a side between 1 and 4096 px")
        _require(self.count >= 1, "count", self.count, "1 or more")
        _require(self.crop in CROPS, "crop", self.crop, " or ".join(CROPS))
        _require(0.0 <= self.turn_deg <= 180.0, "turn_deg", self.turn_deg, "an angle between 0 and 180")
        _require(self.shift_px >= 0, "shift_px", self.shift_px, "0 or more")
        _require(self.shows in ("pixels", "positive"), "shows", self.shows, "pixels or positive")
        _require(
            0.0 < self.scale[0] <= self.scale[1] <= 1.0, "scale", self.scale, "two increasing area fractions in (0, 1]"
        )
        _require(0.0 < self.ratio[0] <= self.ratio[1], "ratio", self.ratio, "two increasing aspect ratios above 0")
        if self.crop == "center":
            _require(self.resize >= self.size, "resize", self.resize, f"at least size={self.size} px")


def num_views(specs: Sequence[ViewSpec]) -> int:
    """Views that one image becomes."""
    return sum(spec.count for spec in specs)


def role_counts(specs: Sequence[ViewSpec]) -> dict[str, int]:
    """How many views each role has, over all its specs."""
    counts: dict[str, int] = {}
    for spec in specs:
        counts[spec.role] = counts.get(spec.role, 0) + spec.count
    return counts


def by_role(specs: Sequence[ViewSpec], views: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Views in `flatten` order, sorted by role."""
    sorted_views: dict[str, list[Tensor]] = {spec.role: [] for spec in specs}
    for (_, spec), view in zip(flatten(specs), views, strict=True):
        sorted_views[spec.role].append(view)
    return sorted_views


def flatten(specs: Sequence[ViewSpec]) -> list[tuple[int, ViewSpec]]:
    """The views of one image in the order in which backends return them: (view number, its spec).

    The number is what `pipelines.draw` draws for: the place in this list or, with `same_as`, that of the other view.
    Raises ValueError if `same_as` names no role.
    """
    expanded = [spec for spec in specs for _ in range(spec.count)]
    roles = [spec.role for spec in expanded]
    for spec in expanded:
        _require(not spec.same_as or spec.same_as in roles, "same_as", spec.same_as, f"one of {sorted(set(roles))}")
    return [(roles.index(spec.same_as) if spec.same_as else place, spec) for place, spec in enumerate(expanded)]


def normalize(pixels: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Pixels 0..255 (B, 3, S, S), of any type, as (pixels / 255 - mean) / std in `dtype`.

    Keeps the device and the memory format, so channels-last stays channels-last. Computes in float32 and does not make
    the host wait for the device.
    """
    scale, bias = _scale_and_bias(tuple(mean), tuple(std), pixels.device)
    if pixels.device.type == "cpu" and pixels.is_contiguous(memory_format=torch.channels_last):
        return _normalize_rows(pixels, scale, bias).to(dtype)
    return torch.addcmul(bias, pixels, scale).to(dtype)


def as_output(pixels: Tensor, spec: ViewSpec, dtype: torch.dtype) -> Tensor:
    """A finished view as loaders hand it out: uint8 as it is, any other dtype normalised."""
    return pixels if dtype == torch.uint8 else normalize(pixels, spec.augment.mean, spec.augment.std, dtype)


def _normalize_rows(pixels: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The same numbers in half the time: a CPU's vectors are longer than the three channels of a pixel."""
    num, channels, height, width = pixels.shape
    rows = pixels.permute(0, 2, 3, 1).reshape(num * height, width * channels).to(torch.float32, copy=True)
    torch.addcmul(bias.flatten().repeat(width), rows, scale.flatten().repeat(width), out=rows)
    return rows.view(num, height, width, channels).permute(0, 3, 1, 2)


# Kept, because copying six numbers to a GPU would make the host wait in every step.
@functools.lru_cache(maxsize=16)
def _scale_and_bias(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    scale = torch.tensor([1 / (255 * s) for s in std], device=device).view(1, 3, 1, 1)
    bias = torch.tensor([-m / s for m, s in zip(mean, std)], device=device).view(1, 3, 1, 1)
    return scale, bias


def _require(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"views.{key} is {value!r}, but must be {remedy}")
