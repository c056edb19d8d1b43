"""The synthetic loader keeps a loader's promises."""

from __future__ import annotations

import pytest
import torch

from pipelines.synthetic import SyntheticLoader
from pipelines.views import ViewSpec

SPECS = [ViewSpec("query", 32), ViewSpec("local", 16, count=2)]


def loader(**options) -> SyntheticLoader:
    return SyntheticLoader(SPECS, **{"batch_size": 8, "num_samples": 20, "num_classes": 3, "seed": 4, **options})


def take(num: int, start: int = 0, **options) -> list:
    batches = loader(**options).batches(start)
    return [next(batches) for _ in range(num)]


def test_a_batch_has_a_loaders_shapes_and_types():
    (batch,) = take(1)
    assert [tuple(view.shape) for view in batch.views["local"]] == [(8, 3, 16, 16)] * 2
    (query,) = batch.views["query"]
    assert query.shape == (8, 3, 32, 32)
    assert query.dtype == torch.uint8
    assert query.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.labels, batch.ids % 3)


def test_pixels_are_noise_that_differs_between_samples_and_views():
    (batch,) = take(1)
    one, other = batch.views["local"]
    assert 120 < one.float().mean() < 135
    flat = torch.cat([one, other]).flatten(1)
    assert len(torch.unique(flat, dim=0)) == 16


@pytest.mark.parametrize("start", [1, 2, 5])
def test_a_step_is_the_same_when_started_at_directly(start):
    expected, (batch,) = take(start + 1)[-1], take(1, start)
    assert batch.step == expected.step == start
    assert torch.equal(batch.ids, expected.ids)
    assert all(torch.equal(*pair) for pair in zip(batch.views["local"], expected.views["local"]))


def test_ranks_share_a_step():
    whole, parts = take(3)[-1], [take(3, rank=rank, world=4)[-1] for rank in range(4)]
    assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
    assert torch.equal(torch.cat([part.views["query"][0] for part in parts]), whole.views["query"][0])


def test_an_epoch_holds_each_sample_once_but_for_the_tail():
    synthetic = loader()
    assert (synthetic.steps_per_epoch, synthetic.dropped_per_epoch) == (2, 4)
    ids = torch.cat([batch.ids for batch in take(2)]).tolist()
    assert len(set(ids)) == 16


def test_no_classes_means_no_labels():
    (batch,) = take(1, num_classes=0)
    assert batch.labels.tolist() == [-1] * 8


@pytest.mark.parametrize("output", ["float32", "float16"])
def test_float_output_is_normalised(output):
    (batch,) = take(1, output=output)
    (query,) = batch.views["query"]
    assert query.dtype == getattr(torch, output)
    assert -2.2 < query.min() < 0 < query.max() < 2.7


def test_the_fingerprint_follows_what_decides_a_step():
    assert loader().fingerprint == loader(rank=1, world=2).fingerprint
    for change in ({"seed": 5}, {"batch_size": 4}, {"num_samples": 21}):
        assert loader().fingerprint != loader(**change).fingerprint


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match=r"run\.batch_size is 21, but the synthetic data holds only 20"):
        loader(batch_size=21)
