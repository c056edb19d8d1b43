import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from fastssl import checkpoint
from fastssl.evaluate.features import features_of
from fastssl.evaluate.main import main, run
from fastssl.evaluate.registry import find
from fastssl.evaluate.settings import load
from fastssl.evaluate.subject import load_subject
from shard_tools.manifest import Manifest
from tests.fastssl.evaluate.conftest import STEP, patches
from tests.fastssl.runs import evaluate_on_two_ranks
from tests.oracle import knn as oracle
from tests.shards import write_split

PROTOCOL = ["evaluator=linear_moco", "evaluator.lr=0.1", "evaluator.epochs=2", "evaluator.batch_size=20"]


def test_knn_is_the_oracle_on_the_checkpoints_own_features(run_dir, patch_shards):
    overrides = ["evaluator=knn_moco_cifar", f"checkpoint={run_dir}", f"data.root={patch_shards}"]
    metrics = run(load(overrides))
    subject = load_subject(load(overrides))
    bank, queries = (
        features_of(subject.backbone, Manifest.load(patch_shards, split), subject.view) for split in ("train", "test")
    )
    arrays = [t.double().numpy() for t in (queries.features, bank.features)]
    scores = oracle.class_scores(*arrays, bank.labels.numpy(), 200, 0.1, 4)
    assert metrics["knn/top1"] == pytest.approx(oracle.accuracy(scores, queries.labels.numpy(), 1))
    assert metrics["knn/top5"] == 1.0  # there are only four classes
    assert 0.25 < metrics["knn/top1"] < 1.0


def test_view_and_normalisation_come_from_the_checkpoint(run_dir, patch_shards):
    base = [f"checkpoint={run_dir}", f"data.root={patch_shards}"]
    view = load_subject(load(base)).view
    assert (view.size, view.resize, view.augment.mean) == (24, 27, (0.4, 0.5, 0.6))
    told = load_subject(load([*base, "view.size=16", "view.resize=20", "data.mean=[0.1,0.1,0.1]"])).view
    assert (told.size, told.resize, told.augment.mean) == (16, 20, (0.1, 0.1, 0.1))


def test_the_view_is_that_of_the_runs_own_monitor_where_it_had_one(run_dir, patch_shards):
    folder = run_dir / "checkpoints" / f"step-{STEP:08d}"
    meta = checkpoint.load_meta(folder)
    meta["config"]["knn"] |= {"view_size": 20, "view_resize": 21}
    checkpoint.save(
        run_dir, STEP + 1, nn.ModuleDict({"encoder": checkpoint.load_backbone(folder)[0]}), {}, meta, keep=2
    )
    view = load_subject(load([f"checkpoint={run_dir}", f"data.root={patch_shards}"])).view
    assert (view.size, view.resize) == (20, 21)


def test_the_baselines_take_encoder_and_view_from_the_run_they_are_like(run_dir, patch_shards):
    base = ["checkpoint=random", f"data.root={patch_shards}"]
    rng_state = torch.get_rng_state()
    like, again = (load_subject(load([*base, f"like={run_dir}"])) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), rng_state)
    other = load_subject(load([*base, f"like={run_dir}", "run.seed=1"]))
    trained, _ = checkpoint.load_backbone(run_dir)
    shapes = {key: value.shape for key, value in trained.state_dict().items()}
    assert {key: value.shape for key, value in like.backbone.state_dict().items()} == shapes
    own = [f"checkpoint={run_dir}", f"data.root={patch_shards}"]
    assert like.view == load_subject(load(own)).view == load_subject(load([*own, f"like={run_dir}"])).view
    assert torch.equal(like.backbone.conv1.weight, again.backbone.conv1.weight)
    assert not torch.equal(like.backbone.conv1.weight, other.backbone.conv1.weight)
    assert load_subject(load([*base, "encoder=resnet18", "view.size=40"])).view.size == 40


def test_the_result_file_holds_metrics_protocol_and_step_beside_the_checkpoints(run_dir, patch_shards, capsys):
    metrics = run(load([f"checkpoint={run_dir}", f"data.root={patch_shards}", "evaluator.k=[5,20]"]))
    result = json.loads((run_dir / "evaluation" / "knn-step-00000007.json").read_text())
    assert result["metrics"] == metrics
    assert result["step"] == 7
    assert set(metrics) == {"knn/top1", "knn/top5", "knn/k5_t0.07/top1", "knn/k20_t0.07/top1"}
    assert metrics["knn/top1"] == metrics["knn/k5_t0.07/top1"]  # the first is the headline
    printed = capsys.readouterr().out
    assert result["protocol"] in printed
    for part in ("at step 7", "61 images of train and 31 of test, 4 classes", "centre crop 24 px", "(0.4, 0.5, 0.6)"):
        assert part in result["protocol"]
    assert list(run_dir.glob("events.out.tfevents.*"))
    assert checkpoint.newest(run_dir).name == "step-00000007"  # the result is in no checkpoint's way


def test_a_look_at_some_images_does_not_overwrite_the_result_on_all(run_dir, patch_shards):
    base = [f"checkpoint={run_dir}", f"data.root={patch_shards}"]
    run(load(base))
    whole = (run_dir / "evaluation" / "knn-step-00000007.json").read_bytes()
    run(load([*base, "data.limit=10"]))
    assert (run_dir / "evaluation" / "knn-step-00000007.json").read_bytes() == whole
    limited = json.loads((run_dir / "evaluation" / "knn-step-00000007-limit-10.json").read_text())
    assert "10 images of train and 10 of test" in limited["protocol"]


def test_a_baseline_writes_where_it_is_told_and_nowhere_else(patch_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ["checkpoint=pixels", "view.size=16", f"data.root={patch_shards}"]
    run(load(base))
    assert list(tmp_path.iterdir()) == []
    assert "eval.out" in capsys.readouterr().err
    run(load([*base, "eval.out=results"]))
    run(load([*base, "eval.out=other/pixels.json"]))
    assert (tmp_path / "results/knn-pixels.json").is_file()
    assert (tmp_path / "other/pixels.json").is_file()


def test_the_sweep_reports_every_probe_and_the_test_accuracy_of_one(run_dir, patch_shards, capsys):
    overrides = ["evaluator=linear", f"checkpoint={run_dir}", f"data.root={patch_shards}", "evaluator.epochs=5"]
    metrics = run(load(overrides))
    result = json.loads((run_dir / "evaluation" / "linear-step-00000007.json").read_text())
    assert len(result["sweep"]["probes"]) == 7 * 4
    assert metrics["linear/top1"] == result["sweep"]["top1"]
    assert metrics["linear/held_out_top1"] == max(p["held_out_top1"] for p in result["sweep"]["probes"])
    assert 0.25 < metrics["linear/top1"] <= 1.0
    assert "trained again on all of train" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["linear_moco", "linear_swav"])
def test_a_published_protocol_runs_on_augmented_views_and_leaves_the_checkpoint_alone(name, run_dir, patch_shards):
    before = checkpoint.check(run_dir / "checkpoints" / "step-00000007")
    short = [f"evaluator={name}", "evaluator.lr=0.1", "evaluator.epochs=2", "evaluator.batch_size=20"]
    metrics = run(load([*short, f"checkpoint={run_dir}", f"data.root={patch_shards}"]))
    assert set(metrics) == {f"{name}/{key}" for key in ("top1", "top5", "best_top1_chosen_on_test", "loss")}
    assert metrics[f"{name}/best_top1_chosen_on_test"] >= metrics[f"{name}/top1"]
    assert metrics[f"{name}/loss"] < np.log(4) * 1.2  # smoke: it neither diverged nor stayed far above chance
    assert before is None
    assert checkpoint.check(run_dir / "checkpoints" / "step-00000007") is None


def test_presets_hold_the_published_values():
    def settings(name):
        return find(load([f"evaluator={name}", "checkpoint=pixels", "data.root=X"]))[1]

    moco, swav = settings("linear_moco"), settings("linear_swav")
    assert (moco.lr, moco.weight_decay, moco.momentum, moco.epochs, moco.batch_size) == (30.0, 0.0, 0.9, 100, 256)
    assert [moco.lr_at(epoch) for epoch in (59, 60, 80)] == pytest.approx([30.0, 3.0, 0.3])
    assert (swav.lr, swav.weight_decay, swav.momentum, swav.epochs, swav.batch_size) == (0.3, 1e-6, 0.9, 100, 256)
    assert swav.lr_at(1) == pytest.approx(0.29992598, abs=1e-8)
    for protocol in (moco, swav):
        assert (protocol.scale, protocol.flip_p, protocol.init_std, protocol.scale_lr) == (
            (0.08, 1.0),
            0.5,
            0.01,
            False,
        )
    assert settings("knn").temperature == (0.07,)
    assert set(settings("knn").k) == {10, 20, 100, 200}
    assert (settings("knn_moco_cifar").k, settings("knn_moco_cifar").temperature) == ((200,), (0.1,))


@pytest.fixture
def other_classes(photos, tmp_path):
    """A test split with three classes instead of four."""
    write_split(tmp_path / "three", *patches(photos[:3], 9, seed=3), split="test")
    return tmp_path / "three"


FAULTS = {
    "no labels": (["data.root={unlabelled}", "data.test_root={shards}"], r"no labels.*pack it with classes"),
    "no labels in test": (["data.test_root={unlabelled}", "data.test_split=train"], "no labels"),
    "other classes": (["data.test_root={three}"], r"different classes \(4 in one and 3 in the other\)"),
    "no test split": (["data.root={tiny}"], r"no split test or val .*only train.*data\.test_split"),
    "unknown test split": (["data.test_split=tset"], r"no split 'tset', only test, train"),
    "no such data": (["data.root=/nowhere"], "no such folder of shards: /nowhere"),
    "no checkpoint": (["checkpoint=/nowhere/run"], r"no checkpoint at /nowhere/run"),
    "no root": (["~data.root"], "data.root is missing"),
    "misspelt key": (["evaluator.temprature=[0.1]"], "evaluator.temprature.*did you mean 'evaluator.temperature'"),
    "misspelt evaluator": (["evaluator=kn"], "evaluator=kn does not exist.*did you mean 'knn'"),
    "wrong type": (["evaluator.k=many"], r"evaluator\.k is 'many'"),
    "senseless value": (["evaluator.k=[0]"], r"evaluator\.k is \[0\]"),
    "limit for a protocol": (["evaluator=linear_moco", "data.limit=5"], "data.limit is 5"),
    "batch beyond the data": (["evaluator=linear_moco"], r"evaluator\.batch_size is 256, .* at most the 61 images"),
    "like nothing": (["checkpoint=random", "like=runs/x"], "no checkpoint at runs/x"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_sentence_and_exit_code_2(
    fault, run_dir, patch_shards, tiny_shards, tiny_shards_unlabelled, other_classes, capsys
):
    places = {
        "shards": patch_shards, "unlabelled": tiny_shards_unlabelled, "three": other_classes, "tiny": tiny_shards,
    }  # fmt: skip
    overrides, message = FAULTS[fault]
    given = {"checkpoint": f"checkpoint={run_dir}", "data.root": f"data.root={patch_shards}"}
    for override in overrides:
        given[override.partition("=")[0].lstrip("~")] = override.format(**places)
    code = main([o for o in given.values() if not o.startswith("~")])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_help_says_how_to_start(capsys):
    assert main(["--help"]) == 0
    assert "fastssl-evaluate evaluator=knn checkpoint=runs/first data.root=SHARDS" in capsys.readouterr().out


@pytest.mark.dist
def test_two_ranks_give_the_result_of_one(run_dir, patch_shards, tmp_path):
    # Batches of 40 give one rank 40 and the other 21 of the training images, and 31 and none of the test images.
    cases = {
        "knn": ["evaluator=knn", "evaluator.k=[5]"],
        "linear": ["evaluator=linear", "evaluator.epochs=3"],
        "linear_moco": PROTOCOL,
    }
    common = [f"checkpoint={run_dir}", f"data.root={patch_shards}", "run.batch_size=40"]
    cases = {name: [*overrides, *common] for name, overrides in cases.items()}
    alone = {name: run(load([*case, f"eval.out={tmp_path}/alone-{name}.json"])) for name, case in cases.items()}
    two = evaluate_on_two_ranks(cases, tmp_path)
    for name, expected in alone.items():
        assert two[name]["metrics"] == pytest.approx(expected, rel=1e-5)  # gradients add up in another order
    assert two["knn"]["metrics"] == alone["knn"]
