"""What each method learns from the same images in the same encoder: kNN top-1 on CIFAR-10, several seeds.

    python -m bench.learning SHARDS runs/learning --epochs 10 --seeds 0 1 2 --jobs 2

Each recipe is trained on one compute thread and one for views, `--jobs` runs side by side; accuracy does not depend on
that. Finished runs are not repeated. Writes OUT/learning.json and prints the table as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastssl.bench.record import machine
from fastssl.log import read_metrics

RECIPES = {
    "MoCo v2": "cifar10_moco_v2_cpu",
    "CLSA": "cifar10_clsa_cpu",
    "SwAV": "cifar10_swav_cpu",
    "Un-Mix on MoCo": "cifar10_unmix_moco_cpu",
    "Un-Mix on SwAV": "cifar10_unmix_swav_cpu",
}


@dataclass(frozen=True)
class Run:
    """knn and untrained are top-1 shares; minutes of training, evaluation and saves included."""

    method: str
    recipe: str
    seed: int
    knn: float
    untrained: float
    minutes: float
    images: int


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shards")
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    arguments = parser.parse_args(argv)
    wanted = [(method, seed) for seed in arguments.seeds for method in arguments.methods]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda w: measure(*w, arguments.shards, arguments.out, arguments.epochs), wanted))
    document = {**conditions(), "epochs": arguments.epochs, "runs": [asdict(run) for run in runs]}
    (arguments.out / "learning.json").write_text(json.dumps(document, indent=1) + "\n")
    print(table(runs))
    return 0


def measure(method: str, seed: int, shards: str, out: Path, epochs: int) -> Run:
    """Train and evaluate one recipe with one seed, or read what is there from before."""
    recipe, folder = RECIPES[method], out / f"{RECIPES[method]}-{seed}"
    result = folder / "learning.json"
    if not result.is_file():
        began = time.perf_counter()
        threads = ["run.device=cpu", f"data.root={shards}"]
        train = [f"recipe={recipe}", f"run.dir={folder}", f"run.seed={seed}", f"run.duration={epochs}ep"]
        call("fastssl.train", *train, f"knn.every={epochs}ep", "run.save_every=never", "run.threads=1", *threads)
        minutes = (time.perf_counter() - began) / 60
        untrained = folder / "untrained.json"
        evaluate = ["evaluator=knn_moco_cifar", "checkpoint=random", f"like={folder}", f"run.seed={seed}"]
        call("fastssl.evaluate", *evaluate, f"eval.out={untrained}", "run.precision=bf16", *threads)
        last = read_metrics(folder)[-1]
        before = json.loads(untrained.read_text())["metrics"]["knn/top1"]
        run = Run(method, recipe, seed, last["knn/top1"], before, minutes, last["images"])
        result.write_text(json.dumps(asdict(run)))
        print(f"{method}, seed {seed}: {run.knn:.1%} after {minutes:.1f} min", file=sys.stderr, flush=True)
    return Run(**json.loads(result.read_text()))


def call(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    if done.returncode:
        raise RuntimeError(
            f"{module} {' '.join(arguments)} ended with {done.returncode}: {done.stderr.decode()[-2000:]}"
        )


def conditions() -> dict[str, Any]:
    """Commit, versions and machine of a measurement."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {"commit": commit, "machine": machine()}


def table(runs: Sequence[Run]) -> str:
    lines = ["| | kNN top-1, mean and range | each seed |", "|---|---|---|"]
    lines.append(_row("random init", [run.untrained for run in runs if run.method == runs[0].method]))
    methods = dict.fromkeys(run.method for run in runs)
    return "\n".join([*lines, *(_row(m, [run.knn for run in runs if run.method == m]) for m in methods)])


def _row(name: str, shares: Sequence[float]) -> str:
    mean, spread = statistics.mean(shares), (max(shares) - min(shares)) / 2
    return f"| {name} | {mean:.1%} ± {spread:.1%} | {', '.join(f'{share:.1%}' for share in shares)} |"


if __name__ == "__main__":
    sys.exit(main())
