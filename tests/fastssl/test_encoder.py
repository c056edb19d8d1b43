"""Backbones: published parameter counts, torchvision's names, and names that do not exist."""

import pytest
import torch
import torchvision

from fastssl.nn.encoder import build_encoder


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "width", "parameters", "features"),
    [("resnet50", 1.0, 23_508_032, 2048), ("resnet50", 2.0, 93_907_072, 4096), ("resnet18", 1.0, 11_176_512, 512)],
)
def test_trunks_have_the_published_size(name, width, parameters, features):
    with torch.device("meta"):
        encoder = build_encoder(name, width=width)
    assert (count(encoder), encoder.num_features) == (parameters, features)


def test_resnet50_is_torchvisions_up_to_the_classifier():
    theirs = torchvision.models.resnet50(weights=None)
    encoder = build_encoder("resnet50")
    missing, unexpected = encoder.load_state_dict(theirs.state_dict(), strict=False)
    assert (missing, sorted(unexpected)) == ([], ["fc.bias", "fc.weight"])
    theirs.fc = torch.nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_the_cifar_stem_keeps_resolution_and_every_encoder_gives_its_features(width):
    encoder = build_encoder("resnet10", "cifar", width).eval()
    assert encoder.conv1(torch.zeros(1, 3, 32, 32)).shape[-2:] == (32, 32)
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, encoder.num_features)


def test_timm_models_serve_by_name():
    encoder = build_encoder("timm/resnet10t").eval()
    assert encoder(torch.zeros(1, 3, 32, 32)).shape == (1, encoder.num_features)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("resnet5",), "encoder.name is 'resnet5' \\(did you mean 'resnet50'"),
        (("timm/resnet5o",), "did you mean 'timm/resnet50'"),
        (("resnet50", "tiny"), "encoder.stem is 'tiny'"),
        (("resnet50", "imagenet", -1.0), "encoder.width is -1.0"),
        (("timm/resnet10t", "cifar"), "do not apply to timm/resnet10t"),
    ],
)
def test_a_wrong_encoder_is_answered_by_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_encoder(*arguments)
