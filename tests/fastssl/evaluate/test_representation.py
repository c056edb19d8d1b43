"""The health of a representation: golden values by hand, an independent version of each formula, and the command."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

from fastssl.evaluate import main as evaluate
from fastssl.evaluate import representation
from fastssl.evaluate.registry import find
from fastssl.evaluate.representation import (
    alignment,
    dead_share,
    effective_dimension,
    paired_features,
    rank_me,
    singular_values,
    training_view,
    uniformity,
)
from fastssl.evaluate.settings import load
from fastssl.evaluate.subject import load_subject
from fastssl.evaluate.task import Task
from pipelines.loader import read_once
from pipelines.views import normalize
from shard_tools.manifest import Manifest
from tests.oracle import representation as oracle

REPOSITORY = Path(__file__).resolve().parents[3]
NAMES = {"rankme", "effective_dimension", "dead_features", "feature_std", "uniformity", "alignment"}


def unit(rng, n, d):
    rows = rng.normal(size=(n, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def signs(d):
    """All 2^d corners of a cube: mean 0, covariance exactly the identity."""
    return torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * d)


def test_identity_covariance_has_as_many_dimensions_as_features():
    assert effective_dimension(signs(6)) == pytest.approx(6, rel=1e-12)
    assert rank_me(singular_values(signs(6))) == pytest.approx(6, rel=1e-5)  # RankMe's epsilon adds this much


def test_features_on_one_line_have_one_dimension():
    line = torch.linspace(-1, 2, 50)[:, None] * torch.tensor([1.0, -2.0, 0.5])
    assert effective_dimension(line) == pytest.approx(1, rel=1e-6)
    assert rank_me(singular_values(line.double())) == pytest.approx(1, abs=1e-5)


def test_equal_features_have_no_dimension_rank_one_and_are_all_dead():
    row = torch.rand(16, generator=torch.Generator().manual_seed(1))
    equal = row.repeat(30, 1)
    assert effective_dimension(equal) == 0
    assert rank_me(singular_values(equal)) == pytest.approx(1, abs=1e-4)
    assert dead_share(equal, 1e-4) == 1
    noisy = equal * (1 + 1e-7 * torch.randn(30, 16, generator=torch.Generator().manual_seed(2)))
    assert effective_dimension(noisy) == 0  # float32 rounding is no dimension
    assert dead_share(noisy, 1e-4) == 1


def test_features_that_are_all_zero_are_dead_and_no_division_fails():
    zeros = torch.zeros(5, 3)
    assert (effective_dimension(zeros), rank_me(singular_values(zeros)), dead_share(zeros, 1e-4)) == (0, 1, 1)


def test_dead_features_are_those_that_do_not_vary():
    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    features[:, 3] = 0
    features[:, 5] = 7.5
    features[:, 6] = 1 + 1e-6 * features[:, 6]
    assert dead_share(features, 1e-4) == 3 / 8
    assert dead_share(features, 0) == 2 / 8


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (9, 9)])
def test_rank_and_dimension_are_the_oracles(rng, shape):
    features = rng.normal(size=shape) * rng.uniform(0.01, 3, size=shape[1]) + rng.normal(size=shape[1])
    ours = torch.from_numpy(features)
    assert_allclose(singular_values(ours).numpy(), np.linalg.svd(features, compute_uv=False), rtol=1e-7)
    assert rank_me(singular_values(ours)) == pytest.approx(oracle.rank_me(features), rel=1e-9)
    assert effective_dimension(ours) == pytest.approx(oracle.participation_ratio(features), rel=1e-10)


def test_tall_and_wide_chunks_add_up(rng, monkeypatch):
    monkeypatch.setattr(representation, "CHUNK", 4)
    for shape in ((30, 6), (6, 30)):
        features = rng.normal(size=shape) + 2
        ours = torch.from_numpy(features)
        assert rank_me(singular_values(ours)) == pytest.approx(oracle.rank_me(features), rel=1e-9)
        assert effective_dimension(ours) == pytest.approx(oracle.participation_ratio(features), rel=1e-10)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_alignment_and_uniformity_are_the_oracles(rng, chunk, monkeypatch):
    monkeypatch.setattr(representation, "CHUNK", chunk)
    x, y = unit(rng, 13, 5), unit(rng, 13, 5)
    assert alignment(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(oracle.alignment(x, y), rel=1e-12)
    assert uniformity(torch.from_numpy(x)) == pytest.approx(oracle.uniformity(x), rel=1e-12)


def test_uniformity_is_0_for_equal_rows_and_known_for_an_orthonormal_basis():
    assert uniformity(torch.tensor([[0.6, 0.8]]).repeat(9, 1)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.eye(6)) == pytest.approx(-4, rel=1e-12)
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])  # one pair equal, two at distance 2
    assert uniformity(opposite) == pytest.approx(math.log((1 + 2 * math.exp(-8)) / 3), rel=1e-12)


def task_for(run_dir, shards, *more):
    cfg = load(["evaluator=representation", f"checkpoint={run_dir}", f"data.root={shards}", "run.device=cpu", *more])
    manifest = Manifest.load(shards)
    return Task(cfg, load_subject(cfg), manifest, manifest, torch.device("cpu"))


def test_the_pairs_are_two_training_views_of_the_same_image(run_dir, patch_shards):
    task = task_for(run_dir, patch_shards, "run.batch_size=8", "run.seed=5")
    ids = torch.tensor([3, 8, 9, 20, 33, 60])
    one, other = paired_features(task, training_view(task), ids)
    spec = training_view(task)
    assert (spec.size, spec.count, spec.crop, spec.augment.mean) == (24, 2, "random_resized", (0.4, 0.5, 0.6))
    for row, sample in enumerate(ids.tolist()):
        (batch,) = read_once(task.train, [spec], batch_size=1, rows=[sample], seed=5)
        for view, found in zip(batch.views["pair"], (one, other)):
            pixels = normalize(view, spec.augment.mean, spec.augment.std, torch.float32)
            with torch.no_grad():
                assert_allclose(found[row], task.subject.backbone(pixels)[0], rtol=1e-4, atol=1e-6)
    assert not torch.equal(one, other)


def test_a_checkpoints_own_file_stands_for_its_folder(run_dir, patch_shards):
    file = run_dir / "checkpoints" / "step-00000007" / "model.pt"
    assert training_view(task_for(file, patch_shards)) == training_view(task_for(run_dir, patch_shards)) is not None


def test_the_command_needs_no_labels_and_reports_every_measure(run_dir, tiny_shards_unlabelled, capsys):
    base = ["evaluator=representation", f"checkpoint={run_dir}", f"data.root={tiny_shards_unlabelled}"]
    metrics = evaluate.run(load([*base, "evaluator.pairs=20", "evaluator.uniformity=30"]))
    assert set(metrics) == {f"representation/{name}" for name in NAMES}
    written = json.loads((run_dir / "evaluation" / "representation-step-00000007.json").read_text())
    assert written["metrics"] == metrics
    assert rank_me(torch.tensor(written["singular_values"])) == pytest.approx(metrics["representation/rankme"])
    for part in ("61 images of train", "all pairs of 30 images", "two training views of 20 images, seed 0"):
        assert part in written["protocol"]
    assert 1 < metrics["representation/rankme"] <= len(written["singular_values"])
    assert 0 < metrics["representation/alignment"] < 2
    assert "effective dimension" in capsys.readouterr().out


def test_a_baseline_like_no_run_has_no_alignment_and_says_so(run_dir, tiny_shards_unlabelled, capsys):
    base = ["evaluator=representation", "checkpoint=pixels", f"data.root={tiny_shards_unlabelled}", "view.size=16"]
    assert set(evaluate.run(load(base))) == {f"representation/{name}" for name in NAMES - {"alignment"}}
    assert "give like=RUN" in capsys.readouterr().out
    assert "representation/alignment" in evaluate.run(load([*base, f"like={run_dir}"]))


@pytest.mark.parametrize("setting", ["pairs=-1", "uniformity=-1", "dead=1.0"])
def test_senseless_settings_are_refused(setting):
    with pytest.raises(ValueError, match=rf"evaluator\.{setting.partition('=')[0]} is .* must be"):
        find(load(["evaluator=representation", f"evaluator.{setting}", "checkpoint=pixels", "data.root=X"]))


def test_one_image_has_no_spread(tiny_shards_unlabelled):
    base = ["evaluator=representation", "checkpoint=pixels", f"data.root={tiny_shards_unlabelled}", "view.size=16"]
    with pytest.raises(ValueError, match="gives 1 image, but a spread needs 2"):
        evaluate.run(load([*base, "data.limit=1"]))


@pytest.mark.dist
def test_two_ranks_give_the_result_of_one(run_dir, patch_shards, tmp_path):
    overrides = ["evaluator=representation", f"checkpoint={run_dir}", f"data.root={patch_shards}",
                 "run.batch_size=20", "run.device=cpu"]  # fmt: skip
    alone = evaluate.run(load([*overrides, f"eval.out={tmp_path}/alone.json"]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "fastssl.evaluate", *overrides, f"eval.out={tmp_path}/two.json"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two.json").read_text())["metrics"]
    # Each rank has fewer threads than one process, which changes the last bits of float32 features.
    assert two == pytest.approx(alone, rel=1e-6)
