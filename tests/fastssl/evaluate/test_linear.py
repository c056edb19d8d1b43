import math
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import nn
from torchvision.transforms.functional import ten_crop

from fastssl.evaluate.feature_forms import MapFeatures, TenCrops, whole_square
from fastssl.evaluate.features import Features, RawPixels
from fastssl.evaluate.linear import (
    LinearProtocol,
    Standardize,
    initial_head,
    judge,
    normalized,
    shuffled_batches,
    stratified_split,
    sweep,
    train_heads,
    train_linear,
)
from fastssl.evaluate.main import main, run
from fastssl.evaluate.registry import find
from fastssl.evaluate.settings import load
from fastssl.nn.encoder import build_encoder
from pipelines.views import ViewSpec
from tests.oracle import linear as oracle

PAIRS = [(0.01, 0.0), (0.3, 1e-3), (1.0, 0.0), (3.0, 0.1)]
MOCO = LinearProtocol()
SWAV = LinearProtocol(lr=0.3, weight_decay=1e-6, schedule="cosine")


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def blobs(rng, num=200, classes=4, width=6, spread=1.0):
    """Separable enough to learn, noisy enough that accuracy is not 1."""
    centres = np.random.default_rng(0).normal(size=(classes, width)) * 2
    labels = rng.integers(0, classes, num)
    x = centres[labels] + spread * rng.normal(size=(num, width))
    return Features(torch.from_numpy(x).float(), torch.from_numpy(labels), torch.arange(num))


# -- the sweep --


def test_probes_trained_at_once_equal_each_trained_alone_by_torch(rng):
    data = blobs(rng, num=70)
    x, y = data.features.double(), data.labels
    together = train_heads(x, y, 4, PAIRS, epochs=3, batch_size=16, momentum=0.9, seed=3)
    for head, (lr, weight_decay) in enumerate(PAIRS):
        alone = nn.Linear(6, 4).double()
        nn.init.zeros_(alone.weight)
        nn.init.zeros_(alone.bias)
        optimizer = torch.optim.SGD(alone.parameters(), lr=lr, momentum=0.9, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / 15)))
        for rows in shuffled_batches(70, 16, 3, seed=3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(alone(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
        assert_allclose(together.weight[head], alone.weight.detach(), rtol=0, atol=1e-9)
        assert_allclose(together.bias[head], alone.bias.detach(), rtol=0, atol=1e-9)


def test_a_probe_matches_the_oracle(rng):
    data = blobs(rng, num=50)
    batches = [rows.numpy() for rows in shuffled_batches(50, 20, 2, seed=1)]
    lrs = [0.5 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    x, y = data.features.double(), data.labels
    weight, bias = oracle.train(x.numpy(), y.numpy(), 4, batches, lrs, 0.01, 0.9)
    ours = train_heads(x, y, 4, [(0.5, 0.01)], epochs=2, batch_size=20, momentum=0.9, seed=1)
    assert_allclose(ours.weight[0], weight, atol=1e-12)
    assert_allclose(ours.bias[0], bias, atol=1e-12)


def test_a_diverging_probe_does_not_touch_its_neighbours_and_is_never_chosen(rng):
    train, test = blobs(rng), blobs(rng)
    result = sweep(train, test, num_classes=4, lrs=[0.1, 1e30], weight_decays=[1e-4, 1e9], epochs=9)
    alone = sweep(train, test, num_classes=4, lrs=[0.1], weight_decays=[1e-4], epochs=9)
    assert [p.diverged for p in result.probes] == [False, True, True, True]
    assert [p.held_out_top1 for p in result.probes[1:]] == [0.0, 0.0, 0.0]
    assert result.best == alone.best
    assert (result.top1, result.top5) == (alone.top1, alone.top5)


def test_the_choice_never_depends_on_the_test_split(rng):
    train, test = blobs(rng), blobs(rng)
    spoiled = replace(test, labels=(test.labels + 1) % 4)
    settings = {"num_classes": 4, "lrs": [1e-4, 0.1, 3.0], "weight_decays": [0.0, 1e-2], "epochs": 2}
    honest, misled = sweep(train, test, **settings), sweep(train, spoiled, **settings)
    assert honest.probes == misled.probes
    assert honest.best == misled.best
    assert honest.top1 > misled.top1


def test_a_test_sample_is_judged_by_itself_whatever_else_is_in_the_test_split(rng):
    train, test = blobs(rng), blobs(rng, spread=3.0)
    far = replace(test, features=test.features * 50 + 100)  # would shift and scale everything if it were looked at
    both = Features(*(torch.cat(pair) for pair in zip(*(vars(part).values() for part in (test, far)))))
    settings = {"num_classes": 4, "lrs": [0.1], "weight_decays": [0.0], "epochs": 2}
    alone, other, together = (sweep(train, part, **settings).top1 for part in (test, far, both))
    assert together == pytest.approx((alone + other) / 2)


def test_without_retraining_the_chosen_probe_itself_is_tested(rng):
    train, test = blobs(rng), blobs(rng)
    settings = {"num_classes": 4, "lrs": [1e-3, 0.1], "weight_decays": [0.0], "epochs": 2, "standardize": False}
    result = sweep(train, test, retrain=False, **settings)
    fit, _ = stratified_split(train.labels, 0.1, 0)
    x, y, pairs = train.features[fit], train.labels[fit], [(1e-3, 0.0), (0.1, 0.0)]
    again = train_heads(x, y, 4, pairs, epochs=2, batch_size=256, momentum=0.9, seed=0)
    chosen = result.probes.index(result.best)
    assert not result.retrained
    assert result.top1 == pytest.approx(float(again.top1_top5(test.features, test.labels)[chosen, 0]))


def test_a_best_learning_rate_at_the_end_of_the_range_is_reported(rng):
    train, test = blobs(rng), blobs(rng)

    def swept(*lrs):
        return sweep(train, test, num_classes=4, lrs=lrs, weight_decays=[0.0], epochs=2)

    assert swept(0.0, 0.1).at_edge  # a probe that learns nothing, and one that does
    assert not swept(0.0, 0.1, 1e38).at_edge
    assert not swept(0.1).at_edge


def test_standardized_probes_do_not_feel_the_scale_of_a_feature(rng):
    train, test = blobs(rng), blobs(rng)
    factor = torch.tensor([2.0**-12, 2.0**9, 1.0, 4.0, 0.5, 64.0])
    settings = {"num_classes": 4, "lrs": [0.1], "weight_decays": [0.0], "epochs": 3}
    scaled = [replace(part, features=part.features * factor) for part in (train, test)]
    assert sweep(*scaled, **settings) == sweep(train, test, **settings)


def test_a_feature_that_never_varies_becomes_zero():
    x = torch.tensor([[1.0, 1e6], [3.0, 1e6], [5.0, 1e6]])
    standard = Standardize.of(x)(x)
    assert_allclose(standard[:, 0], [-1.2247449, 0.0, 1.2247449], rtol=1e-6)
    assert standard[:, 1].tolist() == [0.0, 0.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=80), st.floats(0.01, 0.9), st.integers(0, 99))
def test_the_split_holds_out_its_share_of_every_class_and_keeps_one_to_fit(labels, share, seed):
    labels = torch.tensor(labels)
    if labels.bincount().max() < 2:
        with pytest.raises(ValueError, match="held out"):
            stratified_split(labels, share, seed)
        return
    fit, held = stratified_split(labels, share, seed)
    assert sorted(fit.tolist() + held.tolist()) == list(range(len(labels)))
    for c, total in enumerate(labels.bincount().tolist()):
        count = int((labels[held] == c).sum())
        assert count <= max(total - 1, 0)
        if total >= 2:
            assert count == min(max(1, round(share * total)), total - 1)


def test_the_split_is_a_function_of_the_seed(rng):
    labels = torch.from_numpy(rng.integers(0, 4, 100))
    first, again, other = (stratified_split(labels, 0.2, seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_empty_sweeps_and_senseless_shares_are_refused(rng):
    data = blobs(rng)
    with pytest.raises(ValueError, match="at least one number"):
        sweep(data, data, num_classes=4, lrs=[], weight_decays=[0.0])
    with pytest.raises(ValueError, match=r"held_out is 1\.0"):
        sweep(data, data, num_classes=4, lrs=[0.1], weight_decays=[0.0], held_out=1.0)


# -- the published protocols --


def test_schedules_are_those_of_the_papers():
    assert [MOCO.lr_at(e) for e in (0, 59, 60, 79, 80, 99)] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    assert SWAV.lr_at(1) == pytest.approx(0.29992598, abs=1e-8)
    assert SWAV.lr_at(99) == pytest.approx(7.4016e-5, rel=1e-5)
    clsa = find(load(["evaluator=linear_clsa", "checkpoint=pixels", "data.root=x"]))[1]
    assert [clsa.lr_at(e) for e in (0, 50, 99)] == pytest.approx([10, 5.005, 0.01246473], rel=1e-6)


def test_swavs_variants_differ_from_its_protocol_in_what_their_names_say():
    def settings(name):
        return vars(find(load([f"evaluator={name}", "checkpoint=pixels", "data.root=x"]))[1])

    swav = settings("linear_swav")
    assert (swav["pooling"], swav["batch_norm"], swav["test_views"]) == ("global", False, 1)
    step = {"name": "linear_swav_step", "schedule": "step", "milestones": (60, 80)}
    pooled = {"name": "linear_swav_6x6_bn", "pooling": "swav_6x6", "batch_norm": True}
    assert settings("linear_swav_step") == swav | step
    assert settings("linear_swav_6x6_bn") == swav | pooled
    assert find(load(["evaluator=linear_swav_step", "checkpoint=pixels", "data.root=x"]))[1].lr_at(60) == pytest.approx(
        0.03
    )


def test_lr_follows_the_batch_only_when_asked():
    assert replace(MOCO, batch_size=2048).lr_at(0) == 30
    assert replace(MOCO, batch_size=2048, scale_lr=True).lr_at(0) == 240


def test_the_layer_starts_normal_with_deviation_001_and_bias_0_whatever_the_global_seed():
    torch.manual_seed(1)
    head = initial_head(500, 200, 0.01, seed=5)
    torch.manual_seed(2)
    assert torch.equal(head.weight, initial_head(500, 200, 0.01, seed=5).weight)
    assert float(head.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert float(head.bias.detach().abs().max()) == 0.0


class TinyBackbone(nn.Module):
    num_features = 12

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 12, 4)

    def forward(self, x):
        return self.conv(self.bn(x)).flatten(1)


class LeakyBackbone(TinyBackbone):
    """Its batch norm refuses to leave train mode."""

    def train(self, mode=True):
        super().train(mode)
        self.bn.train()
        return self


@dataclass
class FakeBatch:
    views: dict
    labels: torch.Tensor
    ids: torch.Tensor


class FakeLoader:
    """Images whose brightness tells the class, the same batches every epoch."""

    steps_per_epoch = 3

    def __init__(self, rng, batch=8):
        labels = [torch.from_numpy(rng.integers(0, 3, batch)) for _ in range(self.steps_per_epoch)]
        noise = torch.from_numpy(rng.integers(0, 30, (self.steps_per_epoch, batch, 3, 4, 4)))
        images = [80 * y[:, None, None, None] + noise[step] for step, y in enumerate(labels)]
        self.data = [FakeBatch({"train": [x.to(torch.uint8)]}, y, torch.arange(batch)) for x, y in zip(images, labels)]

    def batches(self, start_step=0):
        while True:
            yield from self.data


def probe(backbone, loader, protocol, test=None, **more):
    torch.manual_seed(0)
    test = test or Features(torch.randn(9, 12), torch.arange(9) % 3, torch.arange(9))
    return train_linear(
        backbone, loader, test, num_classes=3, protocol=protocol, mean=(0.5,) * 3, std=(0.25,) * 3, seed=4, **more
    )


SHORT = LinearProtocol(lr=0.1, epochs=3, milestones=(1, 2), batch_size=8)


def test_the_probe_is_the_plain_loop_of_the_protocol(rng):
    torch.manual_seed(7)
    backbone, loader = TinyBackbone(), FakeLoader(rng)
    result = probe(backbone, loader, replace(SHORT, weight_decay=0.01))
    head = initial_head(12, 3, 0.01, seed=4)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    backbone.eval()
    for epoch, expected in enumerate(result.losses):
        optimizer.param_groups[0]["lr"] = [0.1, 0.01, 0.001][epoch]
        losses = []
        for batch in loader.data:
            x = (batch.views["train"][0].float() / 255 - 0.5) / 0.25
            loss = nn.functional.cross_entropy(head(backbone(x).detach()), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert expected == pytest.approx(np.mean(losses), rel=1e-4)  # float32, another memory format


def test_a_backbone_left_in_train_mode_is_caught_and_named(rng):
    with pytest.raises(RuntimeError, match=r"frozen backbone moved during the first epoch.*bn\.running_mean"):
        probe(LeakyBackbone(), FakeLoader(rng), SHORT)


def test_a_backbone_that_moves_later_is_caught_too(rng):
    backbone = TinyBackbone()

    def nudge(epoch, loss, top1):
        if epoch == 2:
            backbone.conv.bias.data[0] += 1e-3

    with pytest.raises(RuntimeError, match=r"by the last epoch: 1 tensors differ .*conv\.bias"):
        probe(backbone, FakeLoader(rng), SHORT, on_epoch=nudge)


def test_the_backbone_gets_its_modes_back_and_no_gradient(rng):
    backbone = TinyBackbone()
    backbone.conv.eval()
    probe(backbone, FakeLoader(rng), SHORT)
    assert (backbone.training, backbone.bn.training, backbone.conv.training) == (True, True, False)
    assert backbone.conv.weight.grad is None


def test_the_last_epoch_is_the_result_and_the_best_stands_beside_it(rng):
    seen = []
    result = probe(TinyBackbone(), FakeLoader(rng), SHORT, on_epoch=lambda e, loss, top1: seen.append(top1))
    assert result.top1 == seen[-1]
    assert result.best_top1 == max(seen)
    assert seen[result.best_epoch - 1] == max(seen)


def test_a_probe_that_diverges_says_which_setting_to_lower(rng):
    with pytest.raises(ValueError, match=r"lower evaluator\.lr=3e\+38"):
        probe(TinyBackbone(), FakeLoader(rng), replace(SHORT, lr=3e38))


# -- other forms of the features --


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return build_encoder("resnet10", width=0.25).eval()


@torch.no_grad()
def last_map(resnet, images):
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images))))
    return resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))


def test_swavs_pooling_averages_6x6_windows_of_the_7x7_map_channels_first(resnet):
    images = torch.randn(2, 3, 224, 224)
    features = MapFeatures(resnet, 224)
    ours, seen = features(images.contiguous(memory_format=torch.channels_last)).detach(), last_map(resnet, images)
    assert (features.num_features, seen.shape) == (4 * 128, (2, 128, 7, 7))
    for p, (top, left) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        window = seen[:, :, top : top + 6, left : left + 6].mean(dim=(2, 3))
        torch.testing.assert_close(ours[:, p::4], window, rtol=1e-4, atol=1e-5)  # float32, another memory format


def test_the_pooling_leaves_the_backbone_as_it_was(resnet):
    names, features = list(resnet.state_dict()), MapFeatures(resnet, 224)
    resnet.train()
    MapFeatures(resnet, 224)  # the side of the map comes from a forward, which must not move batch norm
    resnet.eval()
    features(torch.randn(1, 3, 224, 224))
    assert list(resnet.state_dict()) == names
    assert not resnet.layer4._forward_hooks
    assert int(resnet.bn1.num_batches_tracked) == 0


def test_backbones_without_a_map_and_maps_smaller_than_the_window_are_refused(resnet):
    with pytest.raises(ValueError, match=r"map of a ResNet, and this is a RawPixels; say evaluator\.pooling=global"):
        MapFeatures(RawPixels(), 224)
    with pytest.raises(ValueError, match=r"a view of 96 px is 3 x 3; say evaluator\.pooling=global, or a larger"):
        MapFeatures(resnet, 96)


def test_ten_crops_are_torchvisions_and_averaging_features_averages_logits():
    images, head = torch.randn(3, 3, 14, 14), nn.Linear(3 * 4 * 4, 5)
    backbone = RawPixels(side=4)
    with torch.no_grad():
        expected = torch.stack([head(backbone(crop)) for crop in ten_crop(images, 8)]).mean(0)
        torch.testing.assert_close(head(TenCrops(backbone, 8)(images)), expected, rtol=0, atol=1e-5)


def test_ten_crops_need_a_margin_around_the_centre_crop():
    with pytest.raises(ValueError, match=r"view\.resize is 24, but must be above view\.size=24"):
        whole_square(ViewSpec(role="test", size=24, crop="center", resize=24))
    with pytest.raises(ValueError, match=r"evaluator\.test_views is 10, but must be 1 for stamps"):
        whole_square(ViewSpec(role="test", size=24, crop="turned"))
    assert whole_square(ViewSpec(role="test", size=24, crop="center", resize=27)).size == 27


def test_batch_norm_before_the_layer_is_swavs_over_the_channels_of_the_map():
    """Float64: the same loss and gradients as BatchNorm2d on the map that the features were flattened from."""
    torch.manual_seed(5)
    pooled, labels = torch.randn(6, 7, 2, 2, dtype=torch.float64) * 3 + 1, torch.tensor([0, 1, 2, 0, 1, 2])
    ours = normalized(nn.Linear(28, 3), 7).double()
    norm, layer = nn.BatchNorm2d(7).double(), nn.Linear(28, 3).double()
    layer.load_state_dict(ours[3].state_dict())
    for _ in range(2):
        loss = nn.functional.cross_entropy(ours(pooled.flatten(1)), labels)
        expected = nn.functional.cross_entropy(layer(norm(pooled).flatten(1)), labels)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
        loss.backward()
        expected.backward()
    torch.testing.assert_close(ours[1].running_var, norm.running_var)
    torch.testing.assert_close(ours[1].weight.grad, norm.weight.grad)
    torch.testing.assert_close(ours[3].weight.grad, layer.weight.grad)


def test_a_probe_with_batch_norm_learns_alike_whatever_the_scale_of_the_features(rng):
    class Scaled(TinyBackbone):
        def forward(self, x):
            return 1000 * super().forward(x)

    torch.manual_seed(7)
    backbone, loader = TinyBackbone(), FakeLoader(rng)
    scaled = Scaled()
    scaled.load_state_dict(backbone.state_dict())
    protocol = replace(SHORT, batch_norm=True)
    plain, large = probe(backbone, loader, protocol), probe(scaled, loader, protocol)
    assert large.losses == pytest.approx(plain.losses, rel=1e-2)  # BatchNorm's eps is 1e-5 of a variance of about 0.1
    assert probe(scaled, loader, SHORT).losses[-1] > 100 * plain.losses[-1]


def test_judging_gives_the_class_that_its_accuracies_count():
    scores = torch.tensor([[3.0, 1, 2], [1, 1, 0], [0, 1, 2], [0, 5, 1]])
    test = Features(scores, torch.tensor([0, 1, 2, 1]), torch.arange(4))
    judged = judge(lambda x: x, test, "cpu")
    assert judged.predicted.tolist() == [0, 0, 2, 1]
    assert (judged.top1, judged.top5) == (0.75, 1.0)


def test_the_protocol_line_names_pooling_batch_norm_and_crops(run_dir, patch_shards, capsys):
    short = ["evaluator.epochs=1", "evaluator.batch_size=20", "evaluator.test_views=10", "view.size=56"]
    places = [f"checkpoint={run_dir}", f"data.root={patch_shards}"]
    metrics = run(load(["evaluator=linear_swav_6x6_bn", *short, *places]))
    assert set(metrics) == {f"linear_swav_6x6_bn/{key}" for key in ("top1", "top5", "best_top1_chosen_on_test", "loss")}
    printed = capsys.readouterr().out.replace("\n", " ")
    assert "batch norm and one linear layer on the frozen backbone" in printed
    assert "6x6 average pooling of the 7x7 map to 2x2x128, SGD lr 0.3" in printed
    assert printed.strip().endswith(f"6x6_bn-step-{7:08d}.json")
    assert "ten crops of 56 px, not the centre alone: the corners and the centre of the central 64 px" in printed


def test_a_view_too_small_for_the_pooling_is_one_sentence(run_dir, patch_shards, capsys):
    places = [f"checkpoint={run_dir}", f"data.root={patch_shards}"]
    assert main(["evaluator=linear_swav_6x6_bn", "evaluator.batch_size=20", *places]) == 2
    error = capsys.readouterr().err
    assert re.search(r"^error: evaluator\.pooling is 'swav_6x6', but the last map of a view of 24 px is 3 x 3", error)
    assert error.count("\n") == 1
