"""Evaluate a checkpoint: `fastssl-evaluate evaluator=knn checkpoint=runs/moco data.root=SHARDS`."""

from __future__ import annotations

import json
import sys

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastssl import __version__, config, dist
from fastssl.evaluate.per_class import PerClass
from fastssl.evaluate.registry import find
from fastssl.evaluate.settings import EvaluateConfig, load
from fastssl.evaluate.subject import Subject, load_subject
from fastssl.evaluate.task import Report, Task, percent
from pipelines.loader import available_cores
from shard_tools.printing import sentence

MANY_CLASSES = 10  # more than fit a glance: the terminal then shows the best and the worst

HELP = """
fastssl-evaluate: accuracy of a frozen backbone on labelled shards (= torchrun -m fastssl.evaluate ...)

  fastssl-evaluate evaluator=knn checkpoint=runs/first data.root=SHARDS
  fastssl-evaluate evaluator=knn checkpoint=random like=runs/first data.root=SHARDS   (the same encoder, untrained)

  evaluator=knn            weighted nearest neighbours: evaluator.k=[20] evaluator.temperature=[0.07]
  evaluator=knn_moco_cifar the same with k 200 and temperature 0.1
  evaluator=linear         features once, a sweep of learning rates and weight decays, chosen by held-out train data
  evaluator=placement      of all images, is a mirrored copy nearest to its original? needs no labels, no test split
  evaluator=representation RankMe, dimension, spread, alignment of the features: a run judged without labels
  evaluator=select         which images to label next: evaluator.budget=100 evaluator.strategy=centers|edges|mixed|...
  evaluator=linear_moco    MoCo's published protocol, 100 epochs of augmented views; linear_clsa, linear_swav,
                           linear_swav_step, linear_swav_6x6_bn: theirs; evaluator.test_views=10: ten-crop test
  evaluator=finetune_1pct  every layer trained on 1 % of each class, or on evaluator.subset_file=NAMES; finetune_10pct,
                           finetune_full
  evaluator=voc07          VOC07 by linear SVMs, mAP; voc07_lowshot: on 1 to 96 images a class; voc07_clsa: CLSA's own
  checkpoint=RUN|RUN/checkpoints/step-N|random|pixels      encoder=resnet50 for checkpoint=random without like=RUN
  checkpoint=FILE          weights of MoCo, SwAV, VISSL, solo-learn, lightly, torchvision, timm (docs/weights.md)
  data.root=SHARDS         data.split=train   data.test_root=SHARDS   data.test_split=test|val   data.limit=0
  view.size=0 view.resize=0 (px, 0: as in training)        eval.out=FOLDER|FILE.json
  run.device=auto|cpu|cuda run.precision=fp32|bf16|fp16    run.batch_size=256 (images per forward on each rank)
exit codes: 0 done, 2 a setting, the checkpoint or the data is wrong
"""


def main(argv: list[str] | None = None) -> int:
    return config.run_command(_command, HELP, argv)


def _command(overrides: list[str]) -> int:
    cfg = load(overrides)
    try:
        run(cfg)
    finally:
        dist.teardown()
    return 0


def run(cfg: EvaluateConfig) -> dict[str, float]:
    """Evaluate, print the protocol and the table, write the result file. Returns metrics such as {"knn/top1": 0.612}.

    Under torchrun the ranks share the work, and all return the same metrics; rank 0 prints and writes.
    """
    device = dist.setup(cfg.run.device)
    if device.type == "cpu":
        torch.set_num_threads(available_cores())  # torchrun leaves each rank one
    evaluator, settings = find(cfg)
    train, test = evaluator.data(cfg)
    subject = load_subject(cfg)
    subject.backbone.to(device).to(memory_format=torch.channels_last)
    task = Task(cfg, subject, train, test, device)
    report = evaluator.evaluate(task, settings)
    if dist.rank() == 0:
        _print(report, settings.name, subject)
        _write(report, settings.name, task)
    return report.metrics


def _print(report: Report, name: str, subject: Subject) -> None:
    table = Table(*report.columns, title=escape(sentence(f"{name}: {subject.label}")))
    for row in report.rows:
        table.add_row(*(escape(sentence(cell)) for cell in row))
    Console().print(table)
    if report.per_class is not None and len(report.per_class.classes) > MANY_CLASSES:
        _print_best_and_worst(report.per_class)
    print(report.protocol)


def _print_best_and_worst(per_class: PerClass) -> None:
    shares, other = per_class.accuracies(), per_class.taken_for()
    names = [escape(sentence(name)) for name in per_class.classes]
    table = Table("class", "top-1", "most often taken for", title="best and worst classes")
    best, worst = per_class.best_and_worst()
    for numbers in (best, worst[::-1]):
        for number in numbers:
            taken = other[number]
            table.add_row(names[number], percent(shares[number] or 0.0), "" if taken is None else names[taken])
        table.add_section()
    Console().print(table)


def _write(report: Report, name: str, task: Task) -> None:
    """The result as JSON, and as scalars beside the curves of the run that it belongs to."""
    cfg, subject = task.cfg, task.subject
    path = task.result_path(name)
    if path is None:
        print("no result file: there is no run to put it beside; give eval.out=FILE.json", file=sys.stderr)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "metrics": report.metrics,
        "protocol": report.protocol,
        **report.details,
        **(report.per_class.details() if report.per_class else {}),
        "step": subject.step,
        "data": {part.split: part.digest for part in (task.train, task.test)},
        "config": config.plain(cfg),
        "versions": {"fastssl": __version__, "torch": torch.__version__},
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    if report.per_class is not None:
        report.per_class.write_csv(path.with_name(f"{path.stem}-per-class.csv"))
    print(f"result: {path}")
    if subject.run_dir is not None and subject.step is not None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(subject.run_dir)) as board:
            for key, value in report.metrics.items():
                board.add_scalar(f"eval/{key}", value, subject.step)


if __name__ == "__main__":
    sys.exit(main())
