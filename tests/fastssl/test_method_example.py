"""docs/methods.md shows how a method is added: its example, taken from the text, trains and resumes like the others."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch

from fastssl import config, methods
from fastssl.schedule import Clock
from fastssl.training import Training, to_device
from pipelines.synthetic import SyntheticLoader

DOCUMENT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", DOCUMENT, re.DOTALL)
    return text


@pytest.fixture
def simsiam(tmp_path, monkeypatch):
    """The example as a user would have it: a module, a line in METHODS, a YAML beside the others."""
    import shutil

    module = types.ModuleType("simsiam_of_the_docs")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(block("python"), "docs/methods.md", "exec"), module.__dict__)
    monkeypatch.setitem(methods.METHODS, "simsiam", (module.SimSiam, module.SimSiamConfig))
    shutil.copytree(config.config_dir(), tmp_path / "configs")
    (tmp_path / "configs" / "method" / "simsiam.yaml").write_text(block("yaml"))
    monkeypatch.setattr(config, "config_dir", lambda: tmp_path / "configs")
    return module


def test_the_example_is_forty_lines_and_trains(simsiam):
    lines = [line for line in block("python").splitlines() if line.strip()]
    assert len(lines) <= 40
    tiny = ["encoder=resnet10_narrow", "views.view.size=32", "method.dim=16", "method.hidden=8", "run.batch_size=8"]
    cfg = config.load(["method=simsiam", "data.root=none", "run.device=cpu", *tiny])
    training = Training.build(cfg, torch.device("cpu"), Clock(4, 8))
    assert isinstance(training.method, simsiam.SimSiam)
    batch = next(SyntheticLoader(cfg.view_specs(), batch_size=8, num_samples=32).batches())
    views = to_device(batch, cfg, training.device)
    losses = [training.step(views, step, 0.05).loss.item() for step in range(20)]
    assert all(-1.0 <= loss <= 1.0 for loss in losses)
    assert losses[-1] < losses[0] - 0.1


def test_a_misspelt_setting_of_the_example_is_named(simsiam):
    with pytest.raises(config.ConfigError, match="hiden"):
        config.load(["method=simsiam", "data.root=none", "method.hiden=3"])
