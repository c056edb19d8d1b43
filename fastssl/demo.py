"""`make demo`: pack photographs, train MoCo v2 on the CPU, evaluate it against two baselines, and report."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fastssl import config, show_views, train
from fastssl.evaluate import main as evaluate
from fastssl.evaluate.settings import load as load_evaluation
from fastssl.log import read_metrics
from shard_tools import cli as shard_tools_cli

HELP = """
python -m fastssl.demo [FOLDER] [key=value ...]: pack a small data set, train on the CPU, evaluate, and report

FOLDER (default runs/demo) receives shards/, the run and the pictures; a second start resumes or repeats the report.
Settings are those of fastssl-train, over recipe=demo: run.duration=60ep, encoder=resnet18, ...
"""

# A sweep of six probes instead of the 28 of evaluator=linear, so that the tables stay short.
EVALUATORS = {
    "knn": ["evaluator.k=[20]"],
    "linear": ["evaluator.lr=[0.03,0.1,0.3]", "evaluator.weight_decay=[0,0.01]", "evaluator.epochs=20"],
}


def main(argv: list[str] | None = None) -> int:
    return config.run_command(_demo, HELP, argv)


def _demo(arguments: list[str]) -> int:
    folder = Path(next((a for a in arguments if "=" not in a), "runs/demo"))
    overrides = [a for a in arguments if "=" in a]
    shards, run_dir = folder / "shards", folder / "run"
    began = time.perf_counter()

    _title("1. pack: photographs to shards")
    _done(shard_tools_cli.main(["pack", "demo", str(shards)]))

    _title("2. views: what the encoder will be shown")
    views = folder / "views.png"
    settings = ["recipe=demo", f"data.root={shards}", f"run.dir={run_dir}", "run.device=cpu", *overrides]
    show = [*settings, "views.ids=[0,1,2,3,4,5]", "views.epoch=0", f"views.out={views}"]
    _done(show_views.main(show))

    _title("3. train: MoCo v2 without labels")
    _done(train.run(config.load(settings)))

    _title("4. evaluate: kNN and a linear probe on frozen features, on the test patches")
    subjects = {"trained": str(run_dir), "random init": "random", "raw pixels": "pixels"}
    accuracy = {}
    for name, subject in subjects.items():
        common = [f"checkpoint={subject}", f"data.root={shards}", "run.device=cpu", f"like={run_dir}"]
        for evaluator, choices in EVALUATORS.items():
            out = f"eval.out={folder / 'evaluation' / evaluator}-{name.replace(' ', '-')}.json"
            result = evaluate.run(load_evaluation([f"evaluator={evaluator}", *choices, *common, out]))
            accuracy[name, evaluator] = result[f"{evaluator}/top1"]
    curve = plot_loss(run_dir, folder / "loss.png")
    _report(folder, run_dir, views, curve, accuracy, time.perf_counter() - began)
    return 0


def plot_loss(run_dir: Path, path: Path) -> Path:
    """The loss, and the share of queries that rank their key first, over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in read_metrics(run_dir) if "loss" in line]
    steps = [line["step"] for line in lines]
    figure, axis = pyplot.subplots(figsize=(7, 3.6), dpi=120)
    axis.plot(steps, [line["loss"] for line in lines], color="tab:blue", label="loss")
    axis.set(xlabel="step", ylabel="InfoNCE loss", title="MoCo v2 on the demo's patches")
    right = axis.twinx()
    right.plot(steps, [line["contrast_top1"] for line in lines], color="tab:orange", label="query finds its key first")
    right.set(ylabel="share of queries", ylim=(0, None))
    figure.legend(loc="upper center", bbox_to_anchor=(0.6, 0.88), frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _done(code: int) -> None:
    """A part that failed has said why; the demo ends with its exit code."""
    if code:
        raise SystemExit(code)


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _report(
    folder: Path, run_dir: Path, views: Path, curve: Path, accuracy: dict[tuple[str, str], float], elapsed_s: float
) -> None:
    from rich.console import Console
    from rich.table import Table

    _title("report")
    table = Table(title="top-1 on test patches: which photograph is this a piece of?")
    for column in ("features", "kNN", "linear probe"):
        table.add_column(column, justify="left" if column == "features" else "right")
    for name in ("trained", "random init", "raw pixels"):
        table.add_row(name, f"{accuracy[name, 'knn']:.1%}", f"{accuracy[name, 'linear']:.1%}")
    Console().print(table)
    rates = [line for line in read_metrics(run_dir) if "images_per_s" in line][1:]
    speed = sum(line["images_per_s"] for line in rates) / len(rates)
    waiting = sum(line["data_wait"] for line in rates) / len(rates)
    print(f"training speed   {speed:.0f} images/s, {waiting:.1%} of the time waiting for data")
    print(f"views            {views}")
    print(f"loss curve       {curve}")
    print(f"run              {run_dir}: config.yaml, metrics.jsonl, TensorBoard events, checkpoints/")
    print(f"results          {folder / 'evaluation'}")
    print(f"in all           {elapsed_s / 60:.1f} minutes")
    print("A demonstration on pieces of 14 photographs, not a benchmark; what to do next is in README.md.")


if __name__ == "__main__":
    sys.exit(main())
