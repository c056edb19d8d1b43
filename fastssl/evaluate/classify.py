"""The evaluators that classify by frozen features: kNN, the quick linear sweep, and the published linear protocols."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

from fastssl import dist
from fastssl.evaluate.knn import knn
from fastssl.evaluate.linear import sweep, train_linear
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
        {"results": [dataclasses.asdict(r) for r in results]},
    )


def evaluate_sweep(task: Task, settings: SweepSettings) -> Report:
    result = sweep(
        task.features(task.train), task.features(task.test), num_classes=task.num_classes,
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
        {"sweep": dataclasses.asdict(result)},
    )


def evaluate_published(task: Task, settings: ProtocolSettings) -> Report:
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
            (f"{settings.epochs} (last)", percent(result.top1), percent(result.top5)),
            (f"{result.best_epoch} (best on {task.test.split} itself)", percent(result.best_top1), ""),
        ],
        {"protocol_settings": dataclasses.asdict(settings), "losses": result.losses, "best_epoch": result.best_epoch},
    )


def _say_epoch(settings: ProtocolSettings) -> Callable[[int, float, float], None]:
    def say(epoch: int, loss: float, top1: float) -> None:
        if dist.rank() == 0:
            lr = settings.lr_at(epoch - 1)
            line = f"epoch {epoch}/{settings.epochs}  lr {lr:g}  loss {loss:.4f}  test top-1 {percent(top1)}"
            print(line, file=sys.stderr, flush=True)

    return say
