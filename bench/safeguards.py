"""What the safeguards cost a run in which nothing goes wrong: the look at each image's header, and steps taken back.

    python -m bench.safeguards SHARDS bench/results/safeguards_NAME.json

views   MoCo v2's by the `native` backend on one thread, with and without the look at headers, in turn: CPU time, as
        wall time says more of the machine's other guests than of a hundredth
step    MoCo v2 with ResNet-50, with and without the copies of all that moves and the look for what is not finite
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from fastssl import config
from fastssl.bench.record import Figure, Record
from fastssl.rejection import Rejection
from fastssl.schedule import Clock
from fastssl.settings import Config
from fastssl.train import set_threads
from fastssl.training import Training, to_device
from pipelines.loader import Loader
from pipelines.synthetic import SyntheticLoader
from shard_tools.manifest import Manifest

CPU = torch.device("cpu")
WITH, WITHOUT = "with", "without"
BATCHES = 10  # of a loader's life


class Unguarded(Rejection):
    """The optimiser's step and nothing else."""

    def keep(self) -> None:
        pass

    def look(self, loss: Tensor) -> None:
        pass

    def update(self) -> None:
        self._optimizer.step()

    def put_back(self) -> None:
        pass


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=40, help="of the views")
    parser.add_argument("--steps", type=int, default=8, help="of each kind")
    parser.add_argument("--batch", type=int, default=64, help="of the views; a step has a quarter")
    arguments = parser.parse_args(argv)
    seconds = {
        "views": views(arguments.shards, arguments.batch, arguments.rounds),
        "step": steps(arguments.batch // 4, arguments.steps),
    }
    figures = {}
    for what, kinds in seconds.items():
        unit = "CPU ms/image" if what == "views" else "s"
        for kind, values in kinds.items():
            figures[f"{what}/{kind}"] = Figure(unit, tuple(values))
        more = [a / b - 1 for a, b in zip(kinds[WITH], kinds[WITHOUT], strict=True)]
        figures[f"{what}/overhead"] = Figure("share", tuple(more))
        print(f"{what}: {statistics.median(kinds[WITH]):.4g} {unit}, {statistics.median(more):+.2%} beside none")
    Record(
        what="MoCo v2's views and its step, with and without what protects them",
        command="python -m bench.safeguards SHARDS FILE",
        figures=figures,
        settings={name: getattr(arguments, name) for name in ("rounds", "steps", "batch")},
    ).save(arguments.out)


def views(shards: Path, batch: int, rounds: int) -> dict[str, list[float]]:
    """CPU milliseconds an image, of both kinds in each round: whole lives of a loader, which works ahead."""
    specs = config.load(["method=moco_v2", f"data.root={shards}", "run.dir=x"]).view_specs()
    found: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    for number in range(rounds + 1):
        for kind in sorted(found, reverse=bool(number % 2)):
            began = time.process_time()
            with _unchecked() if kind == WITHOUT else contextlib.nullcontext():
                manifest = Manifest.load(shards)
                with Loader(manifest, specs, batch_size=batch, seed=0, backend="native", threads=1) as loader:
                    for _ in itertools.islice(loader.batches(), BATCHES):
                        pass
            if number:
                found[kind].append(1000 * (time.process_time() - began) / (BATCHES * batch))
    return found


def steps(batch: int, count: int) -> dict[str, list[float]]:
    """Seconds of a step, of both kinds in turn, on the same weights."""
    words = [f"run.batch_size={batch}", "run.device=cpu", "run.precision=bf16", "run.dir=x", "data.root=x"]
    cfg = config.load(["method=moco_v2", *words])
    set_threads(cfg, CPU)
    made = list(itertools.islice(SyntheticLoader(cfg.view_specs(), batch_size=batch, seed=0).batches(), 2))
    trained = {kind: _training(cfg, kind) for kind in (WITH, WITHOUT)}
    found: dict[str, list[float]] = {WITH: [], WITHOUT: []}
    for number in range(count + 1):
        inputs = to_device(made[number % 2], cfg, CPU)
        for kind in sorted(found, reverse=bool(number % 2)):
            began = time.perf_counter()
            trained[kind].step(inputs, number, 0.003)
            if number:
                found[kind].append(time.perf_counter() - began)
    return found


def _training(cfg: Config, kind: str) -> Training:
    training = Training.build(cfg, CPU, Clock(5004, cfg.run.batch_size))
    if kind == WITHOUT:
        training.__dict__["rejection"] = Unguarded(training.method, training.optimizer, training.scaler, 20)
    return training


def _unchecked() -> contextlib.AbstractContextManager[object]:
    return mock.patch("pipelines.renderer.header_fault", _no_fault)


def _no_fault(file: bytes, size: tuple[int, int]) -> str:
    return ""


if __name__ == "__main__":
    main()
