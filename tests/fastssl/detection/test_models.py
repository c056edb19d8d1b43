"""Detectors around a pre-trained ResNet: whose weights they hold, what C4 computes, and what stays frozen."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from fastssl.detection.models import OneMapAlign, build_detector, freeze_norms, settle_norms
from fastssl.detection.settings import load
from fastssl.nn.encoder import build_encoder

SMALL = {"train_sizes": (64,), "test_size": 64, "max_size": 64, "regions": 16, "channels": 16}


def settings(form, **more):
    cfg = load([f"detection=voc_{form}", "checkpoint=random", "data.root=nowhere"]).model
    anchors = (8, 16, 24, 32, 48)
    return dataclasses.replace(cfg, **SMALL, anchors=anchors, proposals=(50, 20, 50, 20), **more)


@pytest.fixture
def encoder():
    """A narrow ResNet-10 whose batch norms have seen something."""
    torch.manual_seed(1)
    encoder = build_encoder("resnet10", "small", 0.25).train()
    with torch.no_grad():
        for _ in range(3):
            encoder(torch.rand(8, 3, 32, 32))
    return encoder.eval()


def images(num=2):
    return [torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(i)) for i in range(num)]


def targets(num=2, mask=False):
    target = {"boxes": torch.tensor([[4.0, 8, 30, 40]]), "labels": torch.tensor([1])}
    if mask:
        target["masks"] = torch.zeros(1, 64, 64, dtype=torch.uint8)
        target["masks"][:, 8:40, 4:30] = 1
    return [dict(target) for _ in range(num)]


@pytest.mark.parametrize("form", ["c4", "fpn"])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_detector_holds_every_tensor_of_the_checkpoint(encoder, form, norm):
    before = copy.deepcopy(encoder.state_dict())
    model = build_detector(encoder, settings(form, norm=norm), 2)
    held = model.state_dict()
    prefixes = {"c4": ("backbone.", "roi_heads.box_head."), "fpn": ("backbone.body.",)}[form]
    for key, value in before.items():
        if norm == "frozen" and key.endswith("num_batches_tracked"):
            continue
        (found,) = [held[p + key] for p in prefixes if p + key in held]
        assert torch.equal(found, value), key


@pytest.mark.parametrize(("form", "mask"), [("c4", False), ("c4", True), ("fpn", True)])
def test_every_parameter_learns_from_one_step(encoder, form, mask):
    torch.manual_seed(0)
    model = build_detector(encoder, settings(form, mask=mask), 2).train()
    losses = model(images(), targets(mask=mask))
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg",
                           *(["loss_mask"] if mask else [])}  # fmt: skip
    torch.stack(list(losses.values())).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert without == []
    first = next(p for name, p in model.named_parameters() if name.endswith("conv1.weight"))
    assert first.grad.abs().sum() > 0


def test_c4_is_the_trunk_then_stage_4_on_14_px_regions_then_one_more_norm(encoder):
    reference = copy.deepcopy(encoder)
    model = build_detector(encoder, settings("c4"), 2).eval()
    batch = torch.stack(images())
    with torch.no_grad():
        x = reference.maxpool(reference.relu(reference.bn1(reference.conv1(batch))))
        stage3 = reference.layer3(reference.layer2(reference.layer1(x)))
        assert torch.equal(model.backbone(batch), stage3)
        assert stage3.shape[-1] == 64 // 8  # the small stem: stride 2, then 4 of stages 2 and 3
        regions = torch.rand(5, stage3.shape[1], 14, 14)
        nn.init.uniform_(model.roi_heads.box_head.norm.weight)
        expected = model.roi_heads.box_head.norm(reference.layer4(regions)).mean((2, 3))
        assert torch.equal(model.roi_heads.box_head(regions), expected)
    assert model.roi_heads.box_roi_pool.output_size == (14, 14)
    assert model.roi_heads.box_roi_pool.stride == 8


def test_the_stride_of_c4_follows_the_stem():
    for stem, stride in (("imagenet", 16), ("small", 8), ("cifar", 4)):
        model = build_detector(build_encoder("resnet10", stem, 0.25), settings("c4"), 2)
        assert model.roi_heads.box_roi_pool.stride == stride
        side = model.backbone(torch.rand(1, 3, 64, 64)).shape[-1]
        assert side * stride == 64


def test_regions_are_read_with_pixel_centres_at_halves():
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)  # the value at column i is i, at x = i + 0.5 in cells
    regions = OneMapAlign(2, stride=4)({"0": ramp}, [torch.tensor([[16.0, 16, 32, 32]])], [(64, 64)])
    assert torch.allclose(regions[0, 0], torch.tensor([[4.5, 6.5], [4.5, 6.5]]))  # cells 4 to 8, in halves


def test_a_frozen_norm_computes_what_batch_norm_does_in_a_test_and_never_moves(encoder):
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(x)
        frozen = freeze_norms(copy.deepcopy(encoder)).train()
        assert torch.allclose(frozen(x), expected, atol=1e-5)
    model = build_detector(encoder, settings("c4", norm="frozen"), 2).train()
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    before = [copy.deepcopy(m.state_dict()) for m in norms]
    model(images(), targets())
    assert all(torch.equal(b[k], m.state_dict()[k]) for b, m in zip(before, norms, strict=True) for k in b)
    assert len(norms) > 5


def test_settled_norms_are_the_plain_mean_of_the_batches():
    model = nn.Sequential(nn.BatchNorm2d(3))
    batches = [torch.rand(4, 3, 5, 5) * (i + 1) for i in range(3)]
    coming = iter(batches)
    model[0].momentum = 0.1
    settle_norms(model, lambda: model(next(coming)), 3)
    assert torch.allclose(model[0].running_mean, torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0))
    variances = [b.transpose(0, 1).flatten(1).var(1) for b in batches]
    assert torch.allclose(model[0].running_var, torch.stack(variances).mean(0))
    assert model[0].momentum == 0.1


def test_settled_norms_are_the_mean_over_ranks(monkeypatch):
    model, batch = nn.Sequential(nn.BatchNorm2d(3)), torch.rand(4, 3, 5, 5)
    monkeypatch.setattr("fastssl.dist.all_reduce_mean", lambda mine: (mine + 2 * mine) / 2)  # the other has the double
    settle_norms(model, lambda: model(batch), 1)
    assert torch.allclose(model[0].running_mean, 1.5 * batch.mean((0, 2, 3)))
    assert torch.allclose(model[0].running_var, 1.5 * batch.transpose(0, 1).flatten(1).var(1))


def test_what_is_no_resnet_of_three_channels_is_refused():
    for encoder in (build_encoder("timm/vit_tiny_patch16_224"), build_encoder("resnet10", channels=5)):
        with pytest.raises(ValueError, match="detection needs a ResNet of RGB images"):
            build_detector(encoder, settings("c4"), 2)
