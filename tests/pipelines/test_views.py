"""Specifications refuse what cannot be meant; `normalize` is ToTensor and Normalize."""

from __future__ import annotations

import pytest
import torch

from pipelines.augment import AugmentSpec
from pipelines.views import ViewSpec, flatten, normalize, num_views


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("jitter_p", 1.1),
        ("brightness", -0.1),
        ("hue", 0.6),
        ("blur_sigma", (2.0, 0.1)),
        ("blur_sigma", (0.0, 1.0)),
        ("solarize_threshold", 257),
        ("std", (0.2, 0.0, 0.2)),
    ],
)
def test_an_impossible_augmentation_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"augment\.{key} is .* must be"):
        AugmentSpec(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("role", "two words"),
        ("size", 0),
        ("count", 0),
        ("crop", "middle"),
        ("scale", (0.5, 1.2)),
        ("scale", (0.0, 1.0)),
        ("ratio", (2.0, 1.0)),
    ],
)
def test_an_impossible_view_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match=rf"views\.{key} is .* must be"):
        ViewSpec(**{"role": "query", "size": 32, key: value})


def test_a_center_view_needs_a_resize_of_at_least_its_size():
    with pytest.raises(ValueError, match=r"views\.resize is 31"):
        ViewSpec("eval", 32, crop="center", resize=31)


def test_views_are_numbered_through_the_roles():
    specs = [ViewSpec("global", 32, count=2), ViewSpec("local", 16, count=3)]
    assert num_views(specs) == 5
    assert [(view, spec.role) for view, spec in flatten(specs)] == [
        (0, "global"),
        (1, "global"),
        (2, "local"),
        (3, "local"),
        (4, "local"),
    ]


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)],  # half a step of each type at 3.9
)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_normalize_is_that_of_torchvision_and_keeps_the_memory_format(dtype, tolerance, memory_format):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.21, 0.18)
    pixels = (
        torch.arange(256, dtype=torch.uint8).repeat(3 * 2).view(2, 3, 16, 16).contiguous(memory_format=memory_format)
    )
    normalized = normalize(pixels, mean, std, dtype)
    assert normalized.dtype == dtype
    assert normalized.is_contiguous(memory_format=memory_format)
    expected = (pixels.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(normalized.double(), expected, atol=tolerance, rtol=0)
