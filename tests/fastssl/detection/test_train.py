"""The detection command on coloured shapes: it learns, resumes bit for bit, and tests alike on any number of ranks."""

import json

import pytest
import torch

from fastssl import checkpoint
from fastssl.detection.settings import load
from fastssl.detection.train import load_transfer, main, run
from tests.fastssl.detection.shapes import write_coco, write_voc
from tests.fastssl.runs import finish, start

SMALL = [
    "encoder=resnet10_narrow", "encoder.stem=small", "encoder.width=0.25", "run.device=cpu", "run.workers=0",
    "run.threads=1", "model.mask=false", "model.train_sizes=[64]", "model.test_size=64", "model.max_size=64",
    "model.anchors=[8,16,24,32,48]", "model.proposals=[100,50,100,50]", "model.regions=32", "model.channels=16",
    "model.precise_batches=4", "optim.batch_size=4", "optim.lr=0.05", "optim.milestones=[]", "optim.warmup=5",
]  # fmt: skip


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("coco") / "coco", {"train2017": 32, "val2017": 8})


def settings(root, run_dir, steps, *more, preset="coco_c4", subject="random"):
    return [f"detection={preset}", f"checkpoint={subject}", f"data.root={root}", *SMALL, f"optim.steps={steps}",
            *([f"run.dir={run_dir}"] if run_dir else []), *more]  # fmt: skip


def test_a_short_run_finds_the_shapes_that_an_untrained_detector_does_not(coco, tmp_path, capsys):
    untrained = run(load(settings(coco, tmp_path / "none", 1, "optim.lr=1e-9")))
    trained = run(load(settings(coco, tmp_path / "run", 40)))
    assert untrained["detection/voc_ap50"] < 0.1
    assert trained["detection/voc_ap50"] > 0.4
    assert trained["detection/coco_ap50"] == pytest.approx(trained["detection/voc_ap50"], abs=0.15)
    result = json.loads((tmp_path / "run/detection.json").read_text())
    assert result["metrics"] == trained
    assert set(result["voc_ap50_of_class"]) == {"dog", "sheep"}
    assert "Faster R-CNN c4 of untrained resnet10" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 40
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


@pytest.mark.parametrize("preset", ["coco_fpn", "coco_c4"])
def test_a_run_in_two_pieces_is_the_run_in_one(coco, tmp_path, preset):
    more = ["model.mask=true", "run.save_every=2"]
    whole = run(load(settings(coco, tmp_path / "whole", 4, *more, preset=preset)))
    assert run(load(settings(coco, tmp_path / "pieces", 4, *more, "run.stop_after=2", preset=preset))) == {}
    assert run(load(settings(coco, tmp_path / "pieces", 4, *more, preset=preset))) == whole
    one, other = (
        torch.load(checkpoint.find(tmp_path / name) / "model.pt", weights_only=True) for name in ("whole", "pieces")
    )
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert "detection/mask_ap" in whole


def test_voc_data_and_a_trained_checkpoint_leave_the_result_beside_it(tmp_path, run_dir):
    root = write_voc(tmp_path / "voc", {"trainval": 8, "test": 4})
    parts = ["data.train=[VOC2007/trainval]", "data.test=[VOC2007/test]", "model.anchors=[8,16,24,32,48]"]
    metrics = run(load(settings(root, None, 1, *parts, preset="voc_fpn", subject=run_dir)))
    result = json.loads((run_dir / "detection/voc_fpn/detection.json").read_text())
    assert result["metrics"] == metrics
    assert "resnet10 at step 7" in result["protocol"]
    own, _ = checkpoint.load_backbone(run_dir)
    held = torch.load(checkpoint.find(run_dir / "detection/voc_fpn") / "model.pt", weights_only=True)
    moved = (held["backbone.body.conv1.weight"] - own.conv1.weight).abs().max()
    assert 0 < moved < 0.01  # one step of the warm-up away from the checkpoint


def test_a_released_weight_file_is_transferred_into_the_run_directory_given(coco, tmp_path, run_dir):
    own, _ = checkpoint.load_backbone(run_dir)
    state = {f"module.encoder_q.{key}": value for key, value in own.state_dict().items()}
    torch.save({"epoch": 1, "arch": "resnet10", "state_dict": state}, tmp_path / "moco.pth")
    found = load_transfer(load(settings(coco, tmp_path / "run", 1, subject=tmp_path / "moco.pth")))
    assert torch.equal(found.encoder.conv1.weight, own.conv1.weight)
    assert found.run_dir is None
    assert "moco.pth" in found.label
    inside = checkpoint.find(run_dir) / "model.pt"  # of a checkpoint folder of ours: it stands for the folder
    assert load_transfer(load(settings(coco, None, 1, subject=inside))).run_dir == run_dir.resolve()


@pytest.mark.dist
def test_two_ranks_train_and_test_as_one_does(coco, tmp_path):
    overrides = settings(coco, tmp_path / "run", 2, "model.norm=frozen")
    code, _, err = finish(start("fastssl.detection", overrides, ranks=2))
    assert code == 0, err
    two = json.loads((tmp_path / "run/detection.json").read_text())["metrics"]
    assert run(load(overrides)) == two  # nothing is left to train: the same weights, tested by one process


def test_a_run_directory_of_another_run_is_refused(coco, tmp_path, capsys):
    overrides = settings(coco, tmp_path / "run", 1)
    assert main(overrides) == 0
    assert main([*overrides, "optim.lr=0.1"]) == 2
    assert "of a run with other settings of optim; give another run.dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["run.dir=\"\""], "checkpoint=random has no run to put it beside"),
        (["data.root=nowhere"], "nowhere/annotations/instances_train2017.json cannot be read"),
        (["model.form=fpn", "model.anchors=[8]"], "model.anchors is [8], but must be 5 sides, one a level"),
        (["optim.batch_size=0"], "optim.batch_size is 0"),
        (["checkpoint=nowhere"], "no checkpoint at nowhere"),
        (["data.train=[]"], "data.train is []"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence_and_exit_code_2(coco, tmp_path, capsys, change, message):
    assert main([*settings(coco, tmp_path / "run", 1), *change]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_a_loss_that_is_not_finite_ends_the_run_with_code_8(coco, tmp_path, capsys):
    assert main(settings(coco, tmp_path / "run", 8, "optim.lr=1e30", "run.log_every=1", "optim.warmup=0")) == 8
    assert "the loss is nan at step" in capsys.readouterr().err.splitlines()[-1]


def test_the_learning_rate_warms_up_then_steps_down():
    schedule = load(["detection=voc_c4", "checkpoint=x", "data.root=y"]).optim
    expected = {0: 0.02 * 0.001, 50: 0.02 * 0.5005, 100: 0.02, 17999: 0.02, 18000: 0.002, 22000: 0.0002}
    assert {step: schedule.lr_at(step) for step in expected} == pytest.approx(expected)


def test_the_presets_are_the_published_schedules():
    for name, steps, milestones, form, mask, low in (
        ("voc_c4", 24_000, (18_000, 22_000), "c4", False, 480),
        ("voc_fpn", 24_000, (18_000, 22_000), "fpn", False, 480),
        ("coco_c4", 180_000, (120_000, 160_000), "c4", True, 640),
        ("coco_fpn", 180_000, (120_000, 160_000), "fpn", True, 640),
    ):
        cfg = load([f"detection={name}", "checkpoint=x", "data.root=y"])
        assert (cfg.optim.steps, cfg.optim.milestones, cfg.optim.batch_size, cfg.optim.lr) == (
            steps,
            milestones,
            16,
            0.02,
        )
        assert (cfg.model.form, cfg.model.mask, cfg.model.norm, cfg.preset) == (form, mask, "batch", name)
        assert (cfg.model.train_sizes[0], cfg.model.train_sizes[-1], cfg.model.test_size) == (low, 800, 800)
        assert cfg.data.format == ("voc" if name.startswith("voc") else "coco")
        proposals = (12_000, 2000, 6000, 1000) if form == "c4" else (2000, 2000, 1000, 1000)
        assert cfg.model.proposals == proposals
