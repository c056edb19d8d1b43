"""Similarity placement of mirrored copies: against its definition, and through the command."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.evaluate import main as evaluate
from fastssl.evaluate.features import Features
from fastssl.evaluate.gallery import CELL_PX, GAP_PX, LABEL_PX, TITLE_PX, thumbnails
from fastssl.evaluate.placement import (
    MIRRORINGS,
    TURNS,
    Mirrored,
    Placed,
    chosen_queries,
    draw_gallery,
    most_similar,
    placements,
)
from fastssl.evaluate.settings import PlacementSettings, load
from shard_tools.manifest import Manifest
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
    assert (tmp_path / "placement-gallery.png").stat().st_size > 1000
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


def test_the_most_similar_are_those_of_scikit_learn_without_the_image_itself(rng):
    neighbors = pytest.importorskip("sklearn.neighbors")
    codes = rng.normal(size=(30, 4))
    queries = [7, 0, 29]
    model = neighbors.NearestNeighbors(n_neighbors=6, metric="cosine").fit(codes)
    apart, expected = model.kneighbors(codes[queries])
    rows, cosines = most_similar(torch.from_numpy(codes), torch.tensor(queries), 5)
    assert rows.tolist() == expected[:, 1:].tolist()
    np.testing.assert_allclose(cosines.numpy(), 1 - apart[:, 1:], atol=1e-12)


def test_duplicates_are_similar_to_each_other_in_the_order_of_their_rows():
    codes = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    rows, cosines = most_similar(codes, torch.tensor([1]), 3)
    assert rows.tolist() == [[0, 3, 2]]
    assert cosines.tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize(("num", "halves"), [(1, (1, 0)), (7, (4, 3)), (8, (4, 4)), (50, (20, 0))])
def test_queries_are_half_drawn_and_half_the_worst_and_all_different(num, halves):
    worst = torch.arange(20).flip(0)
    drawn, misplaced = chosen_queries(worst, num, seed=3)
    assert (len(drawn), len(misplaced)) == halves
    assert len({*drawn, *misplaced}) == sum(halves)
    assert misplaced == [row for row in range(20) if row not in drawn][: halves[1]]
    assert (drawn, misplaced) == chosen_queries(worst, num, seed=3)
    assert num in (1, 50) or drawn != chosen_queries(worst, num, seed=4)[0]


def test_the_gallery_shows_image_mirrored_copies_and_neighbours(tiny_shards):
    manifest = Manifest.load(tiny_shards)
    codes = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(40) + 20  # rows are not ids where samples were left out
    bank = Features(codes, torch.zeros(40), ids)
    placed = {name: torch.full((40,), 2) for name in MIRRORINGS}
    placed["both"][17] = 39
    sheet = draw_gallery(manifest, bank, placed, PlacementSettings("placement", gallery=2, neighbours=3), seed=0)
    drawn, misplaced = chosen_queries(placed["both"], 2, seed=0)
    assert misplaced == [17]

    def cell(row, column):
        left, top = LABEL_PX + column * (CELL_PX + GAP_PX), TITLE_PX + row * (CELL_PX + 28 + GAP_PX)
        return sheet.crop((left, top, left + CELL_PX, top + CELL_PX))

    for row, query in enumerate([drawn[0], 17]):
        near = most_similar(codes, torch.tensor([query]), 3)[0][0].tolist()
        image, *others = thumbnails(manifest, ids[[query, *near]].tolist())
        for column, expected in enumerate([image, *(image.transpose(turn) for turn in TURNS.values()), *others]):
            left = (CELL_PX - expected.width) // 2
            found = cell(row, column).crop((left, 0, left + expected.width, expected.height))
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", MIRRORINGS)
def test_pictures_are_mirrored_as_the_tensors_are(name, photos):
    pixels = torch.from_numpy(np.array(photos[0])).permute(2, 0, 1)
    turned = np.asarray(photos[0].transpose(TURNS[name]))
    np.testing.assert_array_equal(pixels.flip(MIRRORINGS[name]).permute(1, 2, 0).numpy(), turned)


def test_no_gallery_when_it_is_turned_off(tiny_shards_unlabelled, tmp_path):
    overrides = ["evaluator=placement", "checkpoint=pixels", f"data.root={tiny_shards_unlabelled}", "view.size=8"]
    evaluate.run(load([*overrides, f"eval.out={tmp_path}/r.json", "evaluator.gallery=0", "run.device=cpu"]))
    assert [path.name for path in tmp_path.glob("*.png")] == ["r.png"]


def test_the_gallery_of_few_images_shows_what_there_is(tiny_shards_unlabelled, tmp_path):
    overrides = ["evaluator=placement", "checkpoint=pixels", f"data.root={tiny_shards_unlabelled}", "view.size=8"]
    for limit in (1, 2):
        evaluate.run(load([*overrides, f"eval.out={tmp_path}/{limit}.json", f"data.limit={limit}", "run.device=cpu"]))
    assert {path.name for path in tmp_path.glob("*.png")} == {"1.png", "2.png", "2-gallery.png"}
