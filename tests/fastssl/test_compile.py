"""run.compile: the same training as without it, and the same checkpoints, on the CPU with a tiny encoder."""

import shutil

import pytest
import torch

from fastssl import train
from fastssl.config import load
from fastssl.log import read_metrics
from tests.fastssl.runs import settings, state

TINY = ("encoder.name=conv", "encoder.conv={side:32,layers:[[4,3,2],[8,3,2]],features:8}", "encoder.width=1.0")

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


def run(*arguments):
    assert train.run(load(settings(*arguments))) == 0


@pytest.fixture(scope="module")
def runs(tiny_shards, tmp_path_factory):
    """Four steps in eager mode, and two of each in either order with a resume between."""
    folder = tmp_path_factory.mktemp("compile")
    steps = (*TINY, "run.duration=4steps", "run.log_every=1")
    forms = {"eager": ["off"], "on": ["off", "default"], "off": ["default", "off"]}
    for name, modes in forms.items():
        for i, mode in enumerate(modes):
            stop = "run.stop_after=2steps" if i + 1 < len(modes) else "run.stop_after="
            run(tiny_shards, folder / name, *steps, f"run.compile={mode}", stop)
    return folder


@pytest.mark.parametrize("other", ["on", "off"])
def test_losses_and_checkpoints_are_those_of_eager_mode(runs, other):
    """Fused kernels round otherwise: the losses to 1e-4 over four steps, weights to 1e-3 of the largest."""
    losses = [[line["loss"] for line in read_metrics(runs / name)] for name in ("eager", other)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    eager, compiled = state(runs / "eager"), state(runs / other)
    assert eager.keys() == compiled.keys()
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_something_was_compiled(runs):
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
