"""What fastssl-evaluate makes of a file of another project."""

import json
import re

import pytest
import torch

from fastssl.evaluate.main import main, run
from fastssl.evaluate.settings import load
from fastssl.evaluate.subject import load_subject
from fastssl.nn.encoder import build_encoder


@pytest.fixture
def moco_file(tmp_path):
    """A ResNet-10 with a CIFAR stem, a quarter as wide, under MoCo's names."""
    torch.manual_seed(0)
    state = build_encoder("resnet10", "cifar", 0.25).state_dict()
    wrapped = {f"module.encoder_q.{key}": value for key, value in state.items()}
    torch.save({"epoch": 2, "state_dict": wrapped | {"module.queue": torch.zeros(128, 8)}}, tmp_path / "moco.pth.tar")
    return tmp_path / "moco.pth.tar"


def test_a_foreign_file_is_evaluated_by_the_encoder_it_shows(moco_file, patch_shards, tmp_path, capsys):
    base = [f"checkpoint={moco_file}", f"data.root={patch_shards}", "evaluator.k=[5]", f"eval.out={tmp_path}/knn.json"]
    metrics = run(load([*base, "view.size=24"]))
    printed = capsys.readouterr().out
    assert "is resnet10 with a cifar stem and width 0.25 (MoCo, state_dict > module.encoder_q.*)" in printed
    assert "left out: queue (1)" in printed
    assert "view: 24 px of 27, mean (0.485, 0.456, 0.406)" in printed
    result = json.loads((tmp_path / "knn.json").read_text())
    assert (result["metrics"], result["step"]) == (metrics, None)
    assert "128 features of resnet10, fp32" in result["protocol"]


def test_the_result_in_a_folder_has_the_files_name(moco_file, patch_shards, tmp_path):
    run(
        load(
            [f"checkpoint={moco_file}", f"data.root={patch_shards}", "evaluator.k=[5]", f"eval.out={tmp_path}/results"]
        )
    )
    assert "knn-moco.pth.tar.json" in [path.name for path in (tmp_path / "results").iterdir()]


def test_the_view_is_the_stems_unless_told_or_taken_from_a_run(moco_file, run_dir, patch_shards):
    base = [f"checkpoint={moco_file}", f"data.root={patch_shards}"]
    assert load_subject(load(base)).view.size == 32
    like = load_subject(load([*base, f"like={run_dir}"])).view
    assert (like.size, like.augment.mean) == (24, (0.4, 0.5, 0.6))
    told = load_subject(load([*base, "view.size=40", "data.mean=[0.1,0.2,0.3]"])).view
    assert (told.size, told.augment.mean) == (40, (0.1, 0.2, 0.3))


def test_bands_without_a_mean_are_refused(patch_shards, tmp_path):
    torch.save(build_encoder("resnet10", width=0.25, channels=5).state_dict(), tmp_path / "bands.pth")
    with pytest.raises(ValueError, match=r"data\.mean is .* must be one number for each of 5 channels"):
        load_subject(load([f"checkpoint={tmp_path}/bands.pth", f"data.root={patch_shards}"]))


def test_a_checkpoints_own_file_still_means_its_folder(run_dir, patch_shards):
    (folder,) = (run_dir / "checkpoints").glob("step-*")
    subject = load_subject(load([f"checkpoint={folder}/model.pt", f"data.root={patch_shards}"]))
    assert (subject.step, subject.run_dir) == (7, run_dir)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["encoder=resnet18"], r"holds resnet10 with a cifar stem and width 0\.25, but the encoder is resnet18; leave"),
        (["encoder.width=2"], r"but the encoder is resnet50 with width 2"),
    ],
)
def test_another_encoder_is_one_sentence_and_exit_code_2(overrides, sentence, moco_file, patch_shards, capsys):
    assert main([f"checkpoint={moco_file}", f"data.root={patch_shards}", *overrides]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert error.count("\n") == 1
