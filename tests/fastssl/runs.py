"""Small training runs for tests: narrow ResNet-10, 32 px views, 8 images a step, 7 steps an epoch of `tiny_shards`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastssl import checkpoint

REPOSITORY = Path(__file__).parents[2]


def settings(shards: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "encoder=resnet10_narrow", "encoder.width=0.25", "encoder.stem=small", "method.queue_length=20",
        "method.split_groups=2", "views.query.size=32", f"data.root={shards}", f"run.dir={run_dir}", "run.device=cpu",
        "run.batch_size=8", "run.duration=12steps", "run.log_every=3", "run.save_every=2steps", "run.threads=1",
        "loader.threads=1", *more,
    ]  # fmt: skip


def start(module: str, arguments: list[str], ranks: int = 0, **kwargs) -> subprocess.Popen:
    """`python -m module ...`, or under torchrun with `ranks` processes."""
    torchrun = [f"--nproc-per-node={ranks}", "--standalone", "-m"] if ranks else []
    command = [sys.executable, "-m", *(["torch.distributed.run"] if ranks else []), *torchrun, module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore,error:::fastssl.dist"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=pipe, stderr=pipe, text=True, **kwargs)


def finish(process: subprocess.Popen, timeout_s: float = 240) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def evaluate_on_two_ranks(cases: Mapping[str, Sequence[str]], folder: Path) -> dict[str, dict[str, Any]]:
    """Evaluations by two ranks in one start of torchrun: the overrides of each by name -> its result file."""
    lines = ["from fastssl import dist", "from fastssl.evaluate.main import run",
             "from fastssl.evaluate.settings import load"]  # fmt: skip
    lines += [f"run(load({[*case, f'eval.out={folder}/two-{name}.json']!r}))" for name, case in cases.items()]
    (folder / "evaluate_all.py").write_text("\n".join([*lines, "dist.teardown()"]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder / "evaluate_all.py")], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / f"two-{name}.json").read_text()) for name in cases}


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint but the ranks' own, by file and name; numbers as tensors."""
    found = leaves(checkpoint.find(run_dir), ("model.pt", "training.pt"))
    return {k: v if isinstance(v, torch.Tensor) else torch.tensor(float(v or 0)) for k, v in found.items()}


def leaves(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """What the tensor files of a checkpoint folder hold, by file and path in its nested dicts and lists."""
    found = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                walk(child, f"{path}.{key}")
        elif isinstance(node, list | tuple):
            for i, child in enumerate(node):
                walk(child, f"{path}[{i}]")
        else:
            found[path] = node

    for name in names:
        walk(torch.load(folder / name, weights_only=True), name)
    return found


def assert_same_state(a: Path, b: Path) -> None:
    """Bit for bit: weights, key encoder, queue, batch norm, optimiser, scaler."""
    left, right = state(a), state(b)
    assert left.keys() == right.keys()
    assert len(left) > 100
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different[:5]
