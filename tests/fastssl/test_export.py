"""The command fastssl-export: what it takes, what it writes, what it refuses, and that it writes all or nothing."""

import json
import os
import re

import pytest
import timm
import torch
import yaml
from torch import nn

from fastssl import checkpoint, config, export
from fastssl.export import FORMATS, main
from fastssl.nn.encoder import build_encoder
from fastssl.weights import hub

SUFFIX = {"torchvision": ".pth", "detectron2": ".pkl", "detr": ".pth", "safetensors": ".safetensors",
          "torch-export": ".pt2", "onnx": ".onnx", "timm": "", "huggingface": ""}  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run whose only checkpoint, at step 7, holds an untrained ResNet-18, and the results of two evaluations."""
    run = tmp_path_factory.mktemp("runs") / "first"
    overrides = ["encoder=resnet18", "views.query.size=64", "data.mean=[0.4,0.5,0.6]", "data.root=/somewhere/shards"]
    cfg = config.load(overrides)
    torch.manual_seed(3)
    model = nn.ModuleDict({"encoder": build_encoder("resnet18")})
    meta = {"config": config.plain(cfg), "backbone_prefix": "encoder."}
    checkpoint.save(run, 7, model, {}, meta, keep=2)
    (run / "evaluation").mkdir()
    for step, top1 in ((7, 0.6125), (6, 0.1)):
        metrics = {"knn/top1": top1, "knn/k20_t0.07/top1": 0.3}
        result = {"metrics": metrics, "protocol": f"weighted kNN at {step}", "step": step}
        (run / "evaluation" / f"knn-step-{step:08d}.json").write_text(json.dumps(result))
    return run


@pytest.fixture
def foreign(tmp_path):
    state = build_encoder("resnet18").state_dict()
    torch.save(
        {"state_dict": {f"module.encoder_q.{key}": value for key, value in state.items()}}, tmp_path / "moco.pth"
    )
    return tmp_path / "moco.pth"


@pytest.mark.parametrize("form", [form for form in FORMATS if form not in ("torch-export", "onnx")])
def test_each_format_is_one_command(form, run_dir, tmp_path, capsys):
    out = tmp_path / f"exported{SUFFIX[form]}"
    assert main([form, str(run_dir), str(out)]) == 0
    assert out.exists()
    printed = capsys.readouterr().out
    assert f"{form}: resnet18 from step 7 of first" in printed
    assert "input: 64 px of 73, mean (0.4, 0.5, 0.6)" in printed
    assert f"written: {out}" in printed
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of onnxscript
@pytest.mark.parametrize("form", ["torch-export", "onnx"])
def test_a_network_is_written_from_a_foreign_file(form, tmp_path, capsys):
    foreign = tmp_path / "swav.pth"
    state = build_encoder("resnet10", "cifar", 0.25).state_dict()
    torch.save({f"module.{key}": value for key, value in state.items()}, foreign)
    assert main([form, str(foreign), str(tmp_path / f"net{SUFFIX[form]}")]) == 0
    printed = capsys.readouterr().out
    assert "resnet10 with a cifar stem and width 0.25 from swav.pth (torchvision or timm, module.*; left out" in printed


def test_a_run_its_checkpoint_folder_and_its_model_file_are_the_same(run_dir, tmp_path):
    folder = checkpoint.find(run_dir)
    written = []
    for number, path in enumerate((run_dir, folder, folder / "model.pt")):
        assert main(["safetensors", str(path), str(tmp_path / f"{number}.safetensors")]) == 0
        written.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]


def test_the_card_is_filled_from_the_run_and_its_results_at_that_step(run_dir, tmp_path):
    assert main(["huggingface", str(run_dir), str(tmp_path / "hub")]) == 0
    _, head, card = (tmp_path / "hub" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["tags"] == ["image-feature-extraction", "timm", "self-supervised", "moco"]
    assert "trained without labels by moco" in card
    assert "| data | shards, split train |" in card
    assert "| steps | 7 of 256 images; 200ep were planned |" in card
    assert "| knn/top1 | 0.6125 |" in card
    assert "- knn-step-00000007: weighted kNN at 7" in card
    assert "k20" not in card
    assert "at 6" not in card
    assert "/somewhere" not in card
    assert "shorter side 73 px, centre crop 64 px" in card
    model = timm.create_model(f"local-dir:{tmp_path}/hub", pretrained=True, num_classes=0)
    ours, _ = checkpoint.load_backbone(run_dir)
    assert torch.equal(model.layer4[1].conv2.weight, ours.layer4[1].conv2.weight)


def test_the_configs_for_detectron2_lie_beside_the_weights_and_name_them(foreign, tmp_path):
    torch.save({f"module.{key}": value for key, value in build_encoder("resnet50").state_dict().items()}, foreign)
    assert main(["detectron2", str(foreign), str(tmp_path / "swav.pkl"), "--with-config"]) == 0
    for name in ("voc", "coco"):
        text = (tmp_path / f"swav_{name}_c4.yaml").read_text()
        assert yaml.safe_load(text)["MODEL"]["WEIGHTS"] == "swav.pkl"


def test_the_encoder_of_a_file_may_be_named(tmp_path):
    torch.save(build_encoder("timm/resnet10t").state_dict(), tmp_path / "ten.pth")
    assert main(["timm", str(tmp_path / "ten.pth"), str(tmp_path / "ten"), "--encoder", "timm/resnet10t"]) == 0
    assert json.loads((tmp_path / "ten" / "config.json").read_text())["architecture"] == "resnet10t"


def test_nothing_is_replaced_without_overwrite_and_all_of_it_with(run_dir, tmp_path, capsys):
    file, folder = tmp_path / "a.pth", tmp_path / "hub"
    file.write_text("old")
    assert main(["huggingface", str(run_dir), str(folder)]) == 0
    for form, out in (("torchvision", file), ("timm", folder)):
        assert main([form, str(run_dir), str(out)]) == 2
        assert re.search(r"exists; add --overwrite", capsys.readouterr().err)
        assert main([form, str(run_dir), str(out), "--overwrite"]) == 0
    assert file.read_bytes() != b"old"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]  # no card of before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "hub"]


def test_a_config_beside_the_weights_is_not_replaced_either(run_dir, tmp_path, capsys):
    (tmp_path / "a_coco_c4.yaml").write_text("mine")
    assert main(["detectron2", str(run_dir), str(tmp_path / "a.pkl"), "--with-config"]) == 2
    assert "a_coco_c4.yaml exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a_coco_c4.yaml"]


def test_a_folder_with_other_things_in_it_is_never_replaced(run_dir, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    assert main(["timm", str(run_dir), str(tmp_path / "home"), "--overwrite"]) == 2
    assert "holds more than an export" in capsys.readouterr().err
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_an_export_that_breaks_off_leaves_what_was_there(run_dir, tmp_path, monkeypatch):
    out = tmp_path / "hub"
    assert main(["timm", str(run_dir), str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    real = export.write_file

    def full(path, content):
        if path.name == hub.CONFIG:
            raise OSError(28, os.strerror(28), str(path))
        real(path, content)

    monkeypatch.setattr(export, "write_file", full)
    assert main(["huggingface", str(run_dir), str(out), "--overwrite"]) == 4
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


FAULTS = {
    "no such format": (["caffe", "{run}", "{tmp}/x"], r"invalid choice: 'caffe'.*--help"),
    "no OUT": (["timm", "{run}"], "required: OUT.*--help"),
    "another ending": (["onnx", "{run}", "{tmp}/x.pt"], r"format onnx is a file that ends in \.onnx"),
    "a folder for a file": (
        ["detr", "{run}", "{tmp}/full.pth", "--overwrite"],
        r"full\.pth, a folder; give the name of",
    ),
    "no checkpoint": (["detr", "{tmp}/nothing", "{tmp}/x.pth"], r"no checkpoint at .*nothing"),
    "not a weight file": (["detr", "{tmp}/full.pth/text", "{tmp}/x.pth"], "damaged or not a file of torch.save"),
    "config for others": (["detr", "{run}", "{tmp}/x.pth", "--with-config"], "--with-config is for format detectron2"),
    "config of ResNet-18": (["detectron2", "{run}", "{tmp}/x.pkl", "--with-config"], "holds resnet50.*is resnet18"),
    "a run has its encoder": (["detr", "{run}", "{tmp}/x.pth", "--encoder", "resnet50"], "leave --encoder out"),
    "another encoder": (["detr", "{foreign}", "{tmp}/x.pth", "--encoder", "resnet50"], "holds resnet18, but the enc"),
    "an unknown encoder": (["detr", "{foreign}", "{tmp}/x.pth", "--encoder", "resnet5"], "did you mean 'resnet50'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_sentence_and_exit_code_2_and_writes_nothing(fault, run_dir, foreign, tmp_path, capsys):
    arguments, sentence = FAULTS[fault]
    (tmp_path / "full.pth").mkdir()
    (tmp_path / "full.pth" / "text").write_text("no weights")
    before = sorted(tmp_path.rglob("*"))
    assert main([a.format(run=run_dir, foreign=foreign, tmp=tmp_path) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(sentence, error), error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_help_says_how_to_start(capsys):
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "fastssl-export FORMAT CHECKPOINT OUT" in printed
    for form in FORMATS:
        assert form in printed
