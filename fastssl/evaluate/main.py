"""Evaluate a checkpoint: `fastssl-evaluate evaluator=knn checkpoint=runs/moco data.root=SHARDS`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastssl import __version__, config, dist
from fastssl.evaluate import placement
from fastssl.evaluate.features import Features, features_of, width_of
from fastssl.evaluate.knn import knn
from fastssl.evaluate.linear import sweep, train_linear
from fastssl.evaluate.settings import (
    EvaluateConfig,
    KnnSettings,
    PlacementSettings,
    ProtocolSettings,
    SweepSettings,
    load,
)
from fastssl.evaluate.splits import train_and_test
from fastssl.evaluate.subject import Subject, load_subject
from fastssl.settings import require
from pipelines.augment import AugmentSpec
from pipelines.loader import Batch, Loader, available_cores
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest

HELP = """
fastssl-evaluate: accuracy of a frozen backbone on labelled shards (= torchrun -m fastssl.evaluate ...)

  fastssl-evaluate evaluator=knn checkpoint=runs/first data.root=SHARDS
  fastssl-evaluate evaluator=knn checkpoint=random like=runs/first data.root=SHARDS   (the same encoder, untrained)

  evaluator=knn            weighted nearest neighbours: evaluator.k=[20] evaluator.temperature=[0.07]
  evaluator=knn_moco_cifar the same with k 200 and temperature 0.1
  evaluator=linear         features once, a sweep of learning rates and weight decays, chosen by held-out train data
  evaluator=placement      of all images, is a mirrored copy nearest to its original? needs no labels, no test split
  evaluator=linear_moco    MoCo's published protocol, 100 epochs of augmented views; linear_swav, linear_clsa: theirs
  checkpoint=RUN|RUN/checkpoints/step-N|random|pixels      encoder=resnet50 for checkpoint=random without like=RUN
  data.root=SHARDS         data.split=train   data.test_root=SHARDS   data.test_split=test|val   data.limit=0
  view.size=0 view.resize=0 (px, 0: as in training)        eval.out=FOLDER|FILE.json
  run.device=auto|cpu|cuda run.precision=fp32|bf16|fp16    run.batch_size=256 (images per forward on each rank)
exit codes: 0 done, 2 a setting, the checkpoint or the data is wrong
"""


@dataclass(frozen=True)
class Report:
    """metrics are fractions, by name; protocol says how they came about, in one line; rows fill the table."""

    metrics: dict[str, float]
    protocol: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    details: dict[str, Any] = field(default_factory=dict)


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
    settings = cfg.evaluator_settings()
    if isinstance(settings, PlacementSettings):
        train = test = Manifest.load(cfg.data.root, cfg.data.split)
    else:
        train, test = train_and_test(cfg.data.root, cfg.data.split, cfg.data.test_root, cfg.data.test_split)
    subject = load_subject(cfg)
    subject.backbone.to(device).to(memory_format=torch.channels_last)
    task = Task(cfg, subject, train, test, device)
    if isinstance(settings, KnnSettings):
        report = _knn(task, settings)
    elif isinstance(settings, PlacementSettings):
        report = _placement(task, settings)
    elif isinstance(settings, SweepSettings):
        report = _sweep(task, settings)
    else:
        report = _published(task, settings)
    if dist.rank() == 0:
        _print(report, settings.name, subject)
        _write(report, settings.name, task)
    return report.metrics


@dataclass(frozen=True)
class Task:
    """What is evaluated on what, for all evaluators."""

    cfg: EvaluateConfig
    subject: Subject
    train: Manifest
    test: Manifest
    device: torch.device

    @property
    def num_classes(self) -> int:
        return len(self.train.classes or ())

    def features(self, manifest: Manifest, backbone: torch.nn.Module | None = None) -> Features:
        """Of `backbone`, the subject's own by default."""

        def show(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
            if dist.rank() or not sys.stderr.isatty():
                return batches
            console = Console(stderr=True)
            return track(batches, f"features of {manifest.split}", total=total, console=console, transient=True)

        return features_of(
            backbone or self.subject.backbone, manifest, self.subject.view, device=self.device,
            precision=self.cfg.run.precision,
            batch_size=self.cfg.run.batch_size, loader=self.cfg.loader, limit=self.cfg.data.limit, show=show,
        )  # fmt: skip

    def protocol(self) -> str:
        """What every protocol line ends with: features, data, view."""
        sizes = [min(self.cfg.data.limit or m.num_samples, m.num_samples) for m in (self.train, self.test)]
        step = "" if self.subject.step is None else f" at step {self.subject.step}"
        view = self.subject.view
        return (
            f"{width_of(self.subject.backbone)} features of {self.subject.label}{step}, {self.cfg.run.precision}; "
            f"{sizes[0]:,} images of {self.train.split} and {sizes[1]:,} of {self.test.split}, {self.num_classes} "
            f"classes; shorter side to {view.resize} px, centre crop {view.size} px, mean {view.augment.mean}, "
            f"std {view.augment.std}"
        )


def _knn(task: Task, settings: KnnSettings) -> Report:
    bank, queries = task.features(task.train), task.features(task.test)
    results = knn(
        queries,
        bank,
        num_classes=task.num_classes,
        ks=settings.k,
        temperatures=settings.temperature,
        device=task.device,
    )
    metrics = {"knn/top1": results[0].top1, "knn/top5": results[0].top5}
    metrics |= {f"knn/k{r.k}_t{r.temperature:g}/top1": r.top1 for r in results}
    clamped = "" if max(settings.k) <= len(bank) else f", k at most the bank's {len(bank)}"
    return Report(
        metrics,
        f"weighted kNN, cosine similarity, votes e^(similarity/t){clamped}; {task.protocol()}",
        ("k", "t", "top-1", "top-5"),
        [(str(r.k), f"{r.temperature:g}", _percent(r.top1), _percent(r.top5)) for r in results],
        {"results": [dataclasses.asdict(r) for r in results]},
    )


def _placement(task: Task, settings: PlacementSettings) -> Report:
    codes = task.features(task.train).features
    placed = {}
    for name, dims in placement.MIRRORINGS.items():
        mirrored = task.features(task.train, placement.Mirrored(task.subject.backbone, dims))
        placed[name] = placement.placements(codes, mirrored.features, settings.metric)
    summaries = {name: placement.Placed(ranks).summary() for name, ranks in placed.items()}
    summaries["all"] = placement.Placed(torch.cat(list(placed.values()))).summary()
    path = _result_path(task.cfg, settings.name, task.subject)
    if settings.picture and path is not None and dist.rank() == 0:
        placement.draw_histogram(placed, len(codes), path.with_suffix(".png"), task.subject.label)
    view = task.subject.view
    return Report(
        {f"placement/{key}": value for key, value in summaries["all"].items()},
        f"placement of mirrored copies by {settings.metric} distance among {len(codes):,} images of "
        f"{task.train.split}, 1 is nearest; {codes.shape[1]} features of {task.subject.label}, "
        f"{task.cfg.run.precision}, {view.size} px",
        ("mirrored", "in first place", "median", "mean", "max", "mean 1/rank"),
        [
            (
                n.replace("_", "-"),
                _percent(s["first"]),
                f"{s['median']:g}",
                f"{s['mean']:.1f}",
                f"{s['max']:g}",
                f"{s['mrr']:.4f}",
            )
            for n, s in summaries.items()
        ],
        {"mirrorings": summaries},
    )


def _sweep(task: Task, settings: SweepSettings) -> Report:
    result = sweep(
        task.features(task.train), task.features(task.test), num_classes=task.num_classes,
        lrs=settings.lr, weight_decays=settings.weight_decay, epochs=settings.epochs, batch_size=settings.batch_size,
        momentum=settings.momentum, held_out=settings.held_out, standardize=settings.standardize,
        retrain=settings.retrain, seed=task.cfg.run.seed, device=task.device,
    )  # fmt: skip
    best, train, held = result.best, task.train.split, f"{settings.held_out:.0%}"
    rows = []
    for probe in result.probes:
        tested = (_percent(result.top1), _percent(result.top5)) if probe is best else ("", "")
        judged = "diverged" if probe.diverged else _percent(probe.held_out_top1)
        rows.append((f"{probe.lr:g}", f"{probe.weight_decay:g}", judged, *tested))
    scale = "standardised" if settings.standardize else "not standardised"
    fitted = f"then trained again on all of {train}" if result.retrained else "not trained again"
    edge = "; the best lr is an end of evaluator.lr: a wider range may give more" if result.at_edge else ""
    return Report(
        {
            "linear/top1": result.top1,
            "linear/top5": result.top5,
            "linear/held_out_top1": best.held_out_top1,
            "linear/lr": best.lr,
            "linear/weight_decay": best.weight_decay,
        },
        f"linear probes on features of one centre crop, {scale}, SGD {settings.epochs} epochs of batch "
        f"{settings.batch_size}, momentum {settings.momentum:g}, cosine; chosen by {held} of {train} held out, never "
        f"by {task.test.split}, {fitted}{edge}; {task.protocol()}",
        ("lr", "weight decay", "held-out top-1", "test top-1", "test top-5"),
        rows,
        {"sweep": dataclasses.asdict(result)},
    )


def _published(task: Task, settings: ProtocolSettings) -> Report:
    cfg, view = task.cfg, task.subject.view
    if cfg.data.limit:
        raise ValueError(f"data.limit is {cfg.data.limit}, but {settings.name} trains on whole epochs; leave it at 0")
    batch, num_samples, world = settings.batch_size, task.train.num_samples, dist.world()
    require(
        batch <= num_samples, "evaluator.batch_size", batch, f"at most the {num_samples} images of {task.train.root}"
    )
    require(batch % world == 0, "evaluator.batch_size", batch, f"a multiple of the {world} ranks that share it")
    augment = AugmentSpec(flip_p=settings.flip_p, mean=view.augment.mean, std=view.augment.std)
    training = ViewSpec(role="train", size=view.size, scale=settings.scale, ratio=settings.ratio, augment=augment)
    with Loader(
        task.train, [training], batch_size=settings.batch_size, seed=cfg.run.seed, rank=dist.rank(), world=dist.world(),
        backend=cfg.loader.backend, device=str(task.device), threads=cfg.loader.threads, prefetch=cfg.loader.prefetch,
        output="uint8", order=cfg.loader.order,
    ) as loader:  # fmt: skip
        result = train_linear(
            task.subject.backbone, loader, task.features(task.test), num_classes=task.num_classes, protocol=settings,
            device=task.device, precision=cfg.run.precision, mean=augment.mean, std=augment.std, seed=cfg.run.seed,
            on_epoch=_say_epoch(settings),
        )  # fmt: skip
    scaled = "scaled by batch/256" if settings.scale_lr else "not scaled by the batch"
    schedule = (
        f"cosine to {settings.final_lr:g}"
        if settings.schedule == "cosine"
        else f"x{settings.gamma:g} at {list(settings.milestones)}"
    )
    return Report(
        {
            f"{settings.name}/top1": result.top1,
            f"{settings.name}/top5": result.top5,
            f"{settings.name}/best_top1_chosen_on_test": result.best_top1,
            f"{settings.name}/loss": result.losses[-1],
        },
        f"one linear layer on the frozen backbone (eval mode, checked bit for bit), SGD lr {settings.lr:g} ({scaled}) "
        f"{schedule}, {settings.epochs} epochs of batch {settings.batch_size}, weight decay {settings.weight_decay:g}, "
        f"momentum {settings.momentum:g}, random resized crops {settings.scale} and flip {settings.flip_p:g}; the last "
        f"epoch is the result; {task.protocol()}",
        ("epoch", "test top-1", "test top-5"),
        [
            (f"{settings.epochs} (last)", _percent(result.top1), _percent(result.top5)),
            (f"{result.best_epoch} (best on {task.test.split} itself)", _percent(result.best_top1), ""),
        ],
        {"protocol_settings": dataclasses.asdict(settings), "losses": result.losses, "best_epoch": result.best_epoch},
    )


def _say_epoch(settings: ProtocolSettings) -> Callable[[int, float, float], None]:
    def say(epoch: int, loss: float, top1: float) -> None:
        if dist.rank() == 0:
            lr = settings.lr_at(epoch - 1)
            line = f"epoch {epoch}/{settings.epochs}  lr {lr:g}  loss {loss:.4f}  test top-1 {_percent(top1)}"
            print(line, file=sys.stderr, flush=True)

    return say


def _print(report: Report, name: str, subject: Subject) -> None:
    table = Table(*report.columns, title=f"{name}: {subject.label}")
    for row in report.rows:
        table.add_row(*row)
    Console().print(table)
    print(report.protocol)


def _write(report: Report, name: str, task: Task) -> None:
    """The result as JSON, and as scalars beside the curves of the run that it belongs to."""
    cfg, subject = task.cfg, task.subject
    path = _result_path(cfg, name, subject)
    if path is None:
        print("no result file: a baseline has no run to put it beside; give eval.out=FILE.json", file=sys.stderr)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "metrics": report.metrics,
        "protocol": report.protocol,
        **report.details,
        "step": subject.step,
        "data": {part.split: part.digest for part in (task.train, task.test)},
        "config": config.plain(cfg),
        "versions": {"fastssl": __version__, "torch": torch.__version__},
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"result: {path}")
    if subject.run_dir is not None and subject.step is not None:
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(str(subject.run_dir)) as board:
            for key, value in report.metrics.items():
                board.add_scalar(f"eval/{key}", value, subject.step)


def _result_path(cfg: EvaluateConfig, name: str, subject: Subject) -> Path | None:
    if cfg.eval.out.endswith(".json"):
        return Path(cfg.eval.out)
    what = cfg.checkpoint if subject.step is None else f"step-{subject.step:08d}"
    part = f"-limit-{cfg.data.limit}" if cfg.data.limit else ""  # a quick look must not overwrite the real result
    folder = Path(cfg.eval.out) if cfg.eval.out else subject.run_dir and subject.run_dir / "evaluation"
    return folder / f"{name}-{what}{part}.json" if folder else None


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


if __name__ == "__main__":
    sys.exit(main())
