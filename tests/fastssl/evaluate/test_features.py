from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import nn

from fastssl.evaluate.features import RawPixels, block_rows, evaluating, extract, features_of
from fastssl.evaluate.subject import center_view
from fastssl.nn.encoder import build_encoder
from shard_tools.manifest import Manifest


@dataclass
class FakeBatch:
    views: dict
    labels: torch.Tensor
    ids: torch.Tensor


def fake_batches(ids, size=3):
    """Batches of `size` whose image of sample i is all i, and whose label is i mod 4."""
    for part in torch.tensor(ids).split(size):
        images = part[:, None, None, None].expand(-1, 3, 16, 16).to(torch.uint8)
        yield FakeBatch({"test": [images]}, part % 4, part)


PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def test_rows_come_back_in_the_order_of_the_ids_whatever_the_order_of_the_batches():
    found = extract(RawPixels(), fake_batches([9, 4, 0, 7, 2, 5, 1]), **PLAIN)
    assert found.ids.tolist() == [0, 1, 2, 4, 5, 7, 9]
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 3, 1]
    assert_allclose(found.features[:, 0] * 255, found.ids, atol=1e-5)
    assert (found.features.shape, found.features.dtype) == ((7, 768), torch.float32)


def test_a_sample_that_comes_twice_is_refused_by_its_number():
    with pytest.raises(ValueError, match="sample 4 was evaluated twice"):
        extract(RawPixels(), fake_batches([3, 4, 5, 4]), **PLAIN)


def test_features_that_are_not_finite_are_refused_with_a_remedy():
    class Broken(RawPixels):
        def forward(self, images):
            return super().forward(images) / (images[:, 0, 0, 0] > 0.015)[:, None]  # sample 4 and later are whole

    with pytest.raises(ValueError, match=r"4 of 6 samples .* first is sample 0: .*earlier step"):
        extract(Broken(), fake_batches(range(6)), **PLAIN)


def test_l2_gives_rows_of_length_one():
    found = extract(RawPixels(), fake_batches(range(1, 6)), l2=True, **PLAIN)
    assert_allclose(found.features.norm(dim=1), torch.ones(5), rtol=1e-6)


def test_uint8_is_normalised_and_float_is_taken_as_it_is():
    (batch,) = fake_batches([51])
    raw = extract(RawPixels(), [batch], mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.1))
    assert_allclose(raw.features[0].view(3, -1)[:, 0], [(0.2 - 0.1) / 0.5, 0.0, -1.0], atol=1e-6)
    batch.views["test"] = [torch.full((1, 3, 16, 16), 0.75)]
    assert extract(RawPixels(), [batch]).features[0, 0] == 0.75


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_backbone_and_the_random_state_are_left_as_they_were(precision):
    backbone = build_encoder("resnet10", stem="cifar", width=0.125)
    backbone.layer1.eval()
    modes = [m.training for m in backbone.modules()]
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    rng_state = torch.get_rng_state()
    found = extract(backbone, fake_batches(range(5)), precision=precision)
    assert found.features.dtype == torch.float32
    assert [m.training for m in backbone.modules()] == modes
    assert all(torch.equal(value, backbone.state_dict()[key]) for key, value in before.items())
    assert torch.equal(torch.get_rng_state(), rng_state)
    assert not found.features.requires_grad


def test_modes_come_back_even_after_an_error():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout())
    model[1].eval()

    def fail():
        with evaluating(model):
            assert not any(m.training for m in model.modules())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [m.training for m in model.modules()] == [True, True, False]


def test_raw_pixels_of_a_larger_image_are_its_antialiased_average():
    images = torch.rand(2, 3, 64, 64)
    small = RawPixels(side=4)(images).view(2, 3, 4, 4)
    assert_allclose(small.mean(), images.mean(), atol=0.02)
    assert RawPixels(side=64)(images).view_as(images).equal(images)


@given(num=st.integers(1, 60), batch=st.integers(1, 9), world=st.integers(1, 5))
def test_ranks_read_every_row_once_in_the_batches_of_one_process(num, batch, world):
    whole = [part.tolist() for part in block_rows(num, batch, 0, 1).split(batch)]
    shared = [part.tolist() for rank in range(world) for part in block_rows(num, batch, rank, world).split(batch)]
    assert sorted(part for part in shared if part) == sorted(whole)
    assert sorted(row for part in whole for row in part) == list(range(num))


def test_a_split_is_read_whole_or_up_to_the_limit_with_its_own_labels(tiny_shards):
    manifest = Manifest.load(tiny_shards)
    view = center_view(32, 37, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    whole = features_of(RawPixels(), manifest, view, batch_size=16)
    assert whole.ids.tolist() == list(range(61))
    assert whole.labels.tolist() == manifest.index()["label"].tolist()
    some = features_of(RawPixels(), manifest, view, batch_size=16, limit=20)
    assert torch.equal(some.features, whole.features[:20])
    assert len(features_of(RawPixels(), manifest, view, limit=1000)) == 61


def test_a_pass_that_moves_the_backbone_is_refused(tiny_shards):
    class Drifting(RawPixels):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, images):
            self.seen += 1
            return super().forward(images)

    with pytest.raises(RuntimeError, match=r"moved while features were computed.*seen"):
        features_of(Drifting(), Manifest.load(tiny_shards), center_view(16, 16, (0.5,) * 3, (0.5,) * 3))
