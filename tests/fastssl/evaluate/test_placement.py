"""Similarity placement of mirrored copies: against its definition, and through the command."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.evaluate import main as evaluate
from fastssl.evaluate.placement import MIRRORINGS, Mirrored, Placed, placements
from fastssl.evaluate.settings import load
from tests.oracle import placement as oracle


def test_the_worked_example_has_its_placements():
    codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [5.0, 5.0]])
    mirrored = torch.tensor([[0.4, 0.0], [5.0, 4.0], [5.0, 5.2]])
    assert placements(codes, mirrored).tolist() == [1, 2, 1]


@pytest.mark.parametrize("metric", ["l1", "l2", "cosine"])
@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_chunks_and_metrics_agree_with_the_definition(rng, metric, chunk):
    codes = rng.normal(size=(40, 5))
    mirrored = codes + rng.normal(size=(40, 5)) * rng.uniform(0.05, 2, size=(40, 1))
    found = placements(torch.from_numpy(codes), torch.from_numpy(mirrored), metric, chunk)
    expected = oracle.placements(codes, mirrored, metric)
    assert found.tolist() == expected
    assert max(expected) > 3
    assert min(expected) == 1


def test_an_exact_copy_is_placed_before_everything():
    codes = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    assert placements(codes, codes).tolist() == [0] * 5


def test_the_summary_counts_first_places_and_inverse_ranks():
    s = Placed(torch.tensor([1, 0, 2, 4])).summary()
    assert s == pytest.approx({"first": 0.5, "median": 1.0, "mean": 2.0, "max": 4.0, "mrr": (1 + 1 + 0.5 + 0.25) / 4})


def test_the_mirrorings_are_those_of_the_image_axes():
    class Pixels(nn.Module):
        num_features = 4

        def forward(self, x):
            return x.flatten(1)

    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    seen = {name: Mirrored(Pixels(), dims)(image)[0].tolist() for name, dims in MIRRORINGS.items()}
    assert seen == {"left_right": [2, 1, 4, 3], "up_down": [3, 4, 1, 2], "both": [4, 3, 2, 1]}


def test_the_command_needs_no_labels_and_leaves_numbers_and_a_picture(tiny_shards_unlabelled, tmp_path, capsys):
    out = tmp_path / "placement.json"
    overrides = ["evaluator=placement", "checkpoint=pixels", f"data.root={tiny_shards_unlabelled}", f"eval.out={out}"]
    metrics = evaluate.run(load([*overrides, "view.size=32", "run.device=cpu"]))
    written = json.loads(out.read_text())
    assert written["metrics"] == metrics
    assert set(written["mirrorings"]) == {*MIRRORINGS, "all"}
    assert 0 <= metrics["placement/first"] <= 1
    assert metrics["placement/max"] >= metrics["placement/median"] >= 1
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "in first place" in capsys.readouterr().out


def test_a_network_blind_to_mirroring_places_every_copy_first(tiny_shards_unlabelled, tmp_path, monkeypatch):
    class Blind(nn.Module):
        num_features = 3

        def forward(self, x):
            return x.mean((2, 3))

    from fastssl.evaluate import subject

    real = subject.load_subject
    monkeypatch.setattr(
        evaluate, "load_subject", lambda cfg: type(real(cfg))(Blind(), "blind", None, None, real(cfg).view)
    )
    overrides = ["evaluator=placement", "checkpoint=pixels", f"data.root={tiny_shards_unlabelled}", "run.device=cpu"]
    metrics = evaluate.run(load([*overrides, f"eval.out={tmp_path}/r.json", "evaluator.picture=false"]))
    assert metrics["placement/first"] == 1.0
    assert not list(tmp_path.glob("*.png"))


def test_ties_are_won_by_the_copy():
    codes = torch.tensor([[0.0], [1.0]])
    assert placements(codes, torch.tensor([[1.0], [1.5]])).tolist() == [1, 1]
    np.testing.assert_equal(oracle.placements(codes.numpy(), np.array([[1.0], [1.5]]), "l1"), [1, 1])
