"""The evaluators that classify by frozen features: kNN, the quick linear sweep, and the published linear protocols."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from fastssl import dist
from fastssl.evaluate.feature_forms import WINDOW, MapFeatures, ten_crops_line, tested_features
from fastssl.evaluate.features import width_of
from fastssl.evaluate.knn import KnnAccuracy, knn
from fastssl.evaluate.linear import Sweep, Trained, sweep, train_linear
from fastssl.evaluate.settings import KnnSettings, ProtocolSettings, SweepSettings
from fastssl.evaluate.task import Report, Task, percent
from fastssl.settings import require
from pipelines.augment import AugmentSpec
from pipelines.loader import Loader
from pipelines.views import ViewSpec


def evaluate_knn(task: Task, settings: KnnSettings) -> Report:
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
        [(str(r.k), f"{r.temperature:g}", percent(r.top1), percent(r.top5)) for r in results],
        {"results": [_plain(r) for r in results]},
        task.per_class(results[0].predicted),
    )


def evaluate_sweep(task: Task, settings: SweepSettings) -> Report:
    test = task.features(task.test)
    result = sweep(
        task.features(task.train), test, num_classes=task.num_classes,
        lrs=settings.lr, weight_decays=settings.weight_decay, epochs=settings.epochs, batch_size=settings.batch_size,
        momentum=settings.momentum, held_out=settings.held_out, standardize=settings.standardize,
        retrain=settings.retrain, seed=task.cfg.run.seed, device=task.device,
    )  # fmt: skip
    best, train, held = result.best, task.train.split, f"{settings.held_out:.0%}"
    rows = []
    for probe in result.probes:
        tested = (percent(result.top1), percent(result.top5)) if probe is best else ("", "")
        judged = "diverged" if probe.diverged else percent(probe.held_out_top1)
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
        {"sweep": _plain(result)},
        task.per_class(result.predicted),
    )


def evaluate_published(task: Task, settings: ProtocolSettings) -> Report:
    cfg, view = task.cfg, task.subject.view
    backbone: nn.Module = task.subject.backbone
    channels, pooling = width_of(backbone), "global average pooling"
    if settings.pooling == "swav_6x6":
        backbone = pooled = MapFeatures(backbone, view.size)
        windows = f"{pooled.map_px - WINDOW + 1}x{pooled.map_px - WINDOW + 1}"
        pooling = f"6x6 average pooling of the {pooled.map_px}x{pooled.map_px} map to {windows}x{channels}"
    require_epochs(task, settings.name, settings.batch_size, task.train.num_samples)
    test = tested_features(task, backbone, settings.test_views)
    training = training_view(task, settings.scale, settings.ratio, settings.flip_p)
    with Loader(
        task.train, [training], batch_size=settings.batch_size, seed=cfg.run.seed, rank=dist.rank(), world=dist.world(),
        backend=cfg.loader.backend, device=str(task.device), threads=cfg.loader.threads,
        prefetch=cfg.loader.batches_ahead, output="uint8", order=cfg.loader.order, window=cfg.loader.window,
    ) as loader:  # fmt: skip
        result = train_linear(
            backbone, loader, test, num_classes=task.num_classes, protocol=settings, device=task.device,
            precision=cfg.run.precision, mean=view.augment.mean, std=view.augment.std, seed=cfg.run.seed,
            channels=channels, on_epoch=say_epoch(settings.epochs, lambda epoch: f"lr {settings.lr_at(epoch):g}"),
        )  # fmt: skip
    scaled = "scaled by batch/256" if settings.scale_lr else "not scaled by the batch"
    schedule = (
        f"cosine to {settings.final_lr:g}"
        if settings.schedule == "cosine"
        else f"x{settings.gamma:g} at {list(settings.milestones)}"
    )
    norm = "batch norm and " if settings.batch_norm else ""
    return Report(
        {
            f"{settings.name}/top1": result.top1,
            f"{settings.name}/top5": result.top5,
            f"{settings.name}/best_top1_chosen_on_test": result.best_top1,
            f"{settings.name}/loss": result.losses[-1],
        },
        f"{norm}one linear layer on the frozen backbone (eval mode, checked bit for bit), {pooling}, SGD lr "
        f"{settings.lr:g} ({scaled}) {schedule}, {settings.epochs} epochs of batch {settings.batch_size}, weight decay "
        f"{settings.weight_decay:g}, momentum {settings.momentum:g}, random resized crops {settings.scale} and flip "
        f"{settings.flip_p:g}; the last epoch is the result; "
        f"{task.protocol()}{ten_crops_line(view, settings.test_views)}",
        ("epoch", "test top-1", "test top-5"),
        last_and_best(result, settings.epochs, task.test.split),
        {"protocol_settings": dataclasses.asdict(settings), "losses": result.losses, "best_epoch": result.best_epoch},
        task.per_class(result.predicted),
    )


def require_epochs(task: Task, name: str, batch: int, num_samples: int) -> None:
    """ValueError unless `num_samples` training images fill batches that the ranks can share, and no limit is set."""
    limit, world = task.cfg.data.limit, dist.world()
    if limit:
        raise ValueError(f"data.limit is {limit}, but {name} trains on whole epochs; leave it at 0")
    where = f"at most the {num_samples} images of {task.train.place}" + (
        "" if num_samples == task.train.num_samples else " that train"
    )
    require(batch <= num_samples, "evaluator.batch_size", batch, where)
    require(batch % world == 0, "evaluator.batch_size", batch, f"a multiple of the {world} ranks that share it")


def training_view(task: Task, scale: tuple[float, float], ratio: tuple[float, float], flip_p: float) -> ViewSpec:
    """Random resized crops and flips of the size and normalisation that the test has."""
    view = task.subject.view
    augment = AugmentSpec(flip_p=flip_p, mean=view.augment.mean, std=view.augment.std)
    return ViewSpec(role="train", size=view.size, scale=scale, ratio=ratio, augment=augment)


def last_and_best(result: Trained, epochs: int, test_split: str) -> list[tuple[str, str, str]]:
    return [
        (f"{epochs} (last)", percent(result.top1), percent(result.top5)),
        (f"{result.best_epoch} (best on {test_split} itself)", percent(result.best_top1), ""),
    ]


def say_epoch(epochs: int, rates: Callable[[int], str]) -> Callable[[int, float, float], None]:
    """A line for each epoch; `rates` is asked for that of an epoch counted from 0."""

    def say(epoch: int, loss: float, top1: float) -> None:
        if dist.rank() == 0:
            line = f"epoch {epoch}/{epochs}  {rates(epoch - 1)}  loss {loss:.4f}  test top-1 {percent(top1)}"
            print(line, file=sys.stderr, flush=True)

    return say


def _plain(result: KnnAccuracy | Sweep) -> dict[str, Any]:
    """For the result file, which has the predictions as a table by class."""
    return {key: value for key, value in dataclasses.asdict(result).items() if key != "predicted"}
