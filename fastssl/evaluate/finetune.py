"""Fine-tuning: every layer trained on few labelled images, or on all of them.

The semi-supervised protocol of SwAV (arXiv:2006.09882, the authors' eval_semisup.py): a linear layer on the backbone,
both in train mode with batch norm over all ranks, and one learning rate for each. Departures: the last epoch is the
result, and the best on the test split itself, which is what published tables have, stands beside it under that name;
the images that do not fill the last batch of an epoch are left out of that epoch.
"""

# B images of a rank's batch, C classes, F feature width
from __future__ import annotations

import copy
import dataclasses
import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl import dist
from fastssl.evaluate.classify import last_and_best, require_epochs, say_epoch, training_view
from fastssl.evaluate.feature_forms import ten_crops_line, tested_features
from fastssl.evaluate.features import Features, evaluating, forward, width_of
from fastssl.evaluate.linear import Judged, Trained, judge
from fastssl.evaluate.task import Report, Task
from fastssl.nn.sync_batchnorm import sync_batchnorm_
from fastssl.settings import LoaderConfig, require
from pipelines.loader import Batch, read_once
from pipelines.order import order, rows_for_step
from pipelines.views import ViewSpec
from shard_tools.documents import MAX_LIST_BYTES, read_limited
from shard_tools.extract import original_name
from shard_tools.manifest import Manifest

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FinetuneSettings:
    """Published values are those of the presets.

    lr, head_lr     of the backbone and of the layer on it, for this batch unless scale_lr multiplies both with
                    batch_size / 256; both are multiplied with gamma at each of milestones (epochs)
    share           of each class's training images, at least one a class, drawn by run.seed; 1 takes all
    subset_file     the images to train on instead, a file name a line, as SimCLR's lists of 1 % and 10 % of ImageNet
    batch_norm      "sync": statistics over all ranks; "plain": over each rank's own images
    test_views      1, the centre crop, or 10, the corners and the centre and their mirrors
    """

    name: Literal["finetune_1pct", "finetune_10pct", "finetune_full"]
    lr: float
    head_lr: float
    share: float
    subset_file: str = ""
    weight_decay: float = 0.0
    momentum: float = 0.9
    epochs: int = 20
    batch_size: int = 256
    milestones: tuple[int, ...] = (12, 16)
    gamma: float = 0.2
    scale_lr: bool = False
    batch_norm: Literal["sync", "plain"] = "sync"
    test_views: Literal[1, 10] = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5

    def __post_init__(self) -> None:
        require(self.lr >= 0, "evaluator.lr", self.lr, "0 or more")
        require(self.head_lr > 0, "evaluator.head_lr", self.head_lr, "above 0")
        require(self.weight_decay >= 0, "evaluator.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.momentum < 1, "evaluator.momentum", self.momentum, "in [0, 1)")
        require(0 < self.share <= 1, "evaluator.share", self.share, "a share above 0 and up to 1, such as 0.01")
        require(self.epochs >= 1, "evaluator.epochs", self.epochs, "1 or more")
        require(self.batch_size >= 1, "evaluator.batch_size", self.batch_size, "1 or more")

    def lrs_at(self, epoch: int) -> tuple[float, float]:
        """Of the backbone and of the layer in `epoch`, counted from 0."""
        factor = self.gamma ** sum(epoch >= milestone for milestone in self.milestones)
        factor *= self.batch_size / 256 if self.scale_lr else 1
        return self.lr * factor, self.head_lr * factor


class Classifier(nn.Module):
    """A backbone and one linear layer with torch's own start, the same for a seed whatever else drew random numbers."""

    def __init__(self, backbone: nn.Module, num_classes: int, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Linear(width_of(backbone), num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def finetune(
    model: Classifier,
    batches: Iterator[Batch],
    test: Callable[[nn.Module], Features],
    *,
    steps_per_epoch: int,
    settings: FinetuneSettings,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    mean: Sequence[float],
    std: Sequence[float],
    on_epoch: Callable[[int, float, float], None] = lambda epoch, loss, top1: None,
) -> Trained:
    """Train all of `model` on this rank's part of each global batch; `test` gives a backbone's features after an epoch.

    on_epoch is told (epoch from 1, mean loss, test top-1). Raises ValueError if the loss is no longer finite.
    """
    if dist.world() > 1 and settings.batch_norm == "sync":
        sync_batchnorm_(model, "evaluator.batch_norm")
    parts = [{"params": list(part.parameters())} for part in (model.backbone, model.head)]
    optimizer = torch.optim.SGD(parts, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=precision == "fp16")
    wrapped = dist.wrap(model.train())
    losses: list[float] = []
    judged: list[Judged] = []
    for epoch in range(settings.epochs):
        for group, lr in zip(optimizer.param_groups, settings.lrs_at(epoch), strict=True):
            group["lr"] = lr
        total = torch.zeros((), device=device)
        for batch in itertools.islice(batches, steps_per_epoch):
            (images,) = next(iter(batch.views.values()))
            logits = forward(wrapped, images, device=device, precision=precision, mean=mean, std=std)
            loss = functional.cross_entropy(logits, batch.labels.to(device))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
        losses.append(float(dist.all_reduce_mean(total)) / steps_per_epoch)
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the loss of fine-tuning is {losses[-1]} in epoch {epoch + 1}; lower evaluator.lr={settings.lr:g} and "
                f"evaluator.head_lr={settings.head_lr:g}"
            )
        _take_buffers_of_rank_0_(model)
        with evaluating(model):
            judged.append(judge(model.head, test(model.backbone), device))
        on_epoch(epoch + 1, losses[-1], judged[-1].top1)
    return Trained.of(judged, losses)


@torch.no_grad()
def _take_buffers_of_rank_0_(model: nn.Module) -> None:
    """With batch norm "plain" each rank has statistics of its own since the last forward, and ranks share the test."""
    for buffer in model.buffers():
        buffer.copy_(dist.all_gather(buffer[None])[0])


def rows_of_share(labels: Rows, share: float, seed: int) -> Rows:
    """Sorted rows: `share` of each class, rounded, at least one image, drawn by `seed` and the class number alone."""
    chosen = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = max(1, round(share * len(rows)))
        chosen.append(np.random.default_rng([seed, int(label)]).permutation(rows)[:count])
    return np.sort(np.concatenate(chosen))


def rows_of_names(manifest: Manifest, names: Iterable[str], where: str) -> Rows:
    """Sorted rows of the samples packed from these files: paths within the source, or file names, if unique.

    where   the list came from, for messages
    Raises ValueError with the remedy for a name that no sample has, or that several have.
    """
    index = manifest.index()
    packed = [original_name(manifest, index, row) for row in range(manifest.num_samples)]
    by_path = {name: row for row, name in enumerate(packed)}
    by_name: dict[str, list[int]] = {}
    for row, name in enumerate(packed):
        by_name.setdefault(name.rpartition("/")[2], []).append(row)
    chosen: set[int] = set()
    for name in names:
        found = [by_path[name]] if name in by_path else by_name.get(name.rpartition("/")[2], [])
        if len(found) != 1:
            place = manifest.place
            problem = f"{len(found)} images of {place} have that name" if found else f"{place} has none"
            raise ValueError(f"evaluator.subset_file {where} names {name!r}, but {problem}; mend the list, or the data")
        chosen.add(found[0])
    return np.array(sorted(chosen), dtype=np.int64)


def subset_batches(
    manifest: Manifest,
    spec: ViewSpec,
    rows: Rows,
    *,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
    loader: LoaderConfig | None = None,
) -> Iterator[Batch]:
    """This rank's part of each global batch, epoch after epoch without end, from `rows` alone.

    A step is the same images and views for any number of ranks. len(rows) // batch_size steps make an epoch.
    """
    loader = loader or LoaderConfig()
    steps = len(rows) // batch_size
    for epoch in itertools.count():
        shuffled = rows[order(len(rows), seed, epoch)]
        mine = [rows_for_step(shuffled, step, batch_size, dist.rank(), dist.world()) for step in range(steps)]
        yield from read_once(
            manifest, [spec], batch_size=batch_size // dist.world(), rank=0, world=1, backend=loader.backend,
            device=str(device), threads=loader.threads, output="uint8", rows=np.concatenate(mine), seed=seed,
            epoch=epoch,
        )  # fmt: skip


def evaluate_finetune(task: Task, settings: FinetuneSettings) -> Report:
    cfg, view = task.cfg, task.subject.view
    require(cfg.loader.order == "global", "loader.order", cfg.loader.order, "global where single images are chosen")
    rows, chosen = _choose(task, settings)
    require_epochs(task, settings.name, settings.batch_size, len(rows))
    training = training_view(task, settings.scale, settings.ratio, settings.flip_p)
    model = Classifier(copy.deepcopy(task.subject.backbone), task.num_classes, cfg.run.seed).to(task.device)
    result = finetune(
        model,
        subset_batches(
            task.train, training, rows, batch_size=settings.batch_size, seed=cfg.run.seed, device=task.device,
            loader=cfg.loader,
        ),
        lambda backbone: tested_features(task, backbone, settings.test_views),
        steps_per_epoch=len(rows) // settings.batch_size, settings=settings, device=task.device,
        precision=cfg.run.precision, mean=view.augment.mean, std=view.augment.std,
        on_epoch=say_epoch(settings.epochs, lambda epoch: "lr {:g}, head {:g}".format(*settings.lrs_at(epoch))),
    )  # fmt: skip
    scaled = "scaled by batch/256" if settings.scale_lr else "not scaled by the batch"
    norm = {"sync": "over all ranks", "plain": "over each rank's own images"}[settings.batch_norm]
    return Report(
        {
            f"{settings.name}/top1": result.top1,
            f"{settings.name}/top5": result.top5,
            f"{settings.name}/best_top1_chosen_on_test": result.best_top1,
            f"{settings.name}/loss": result.losses[-1],
        },
        f"all layers and one linear layer trained (train mode, batch norm {norm}) on {chosen}, SGD lr {settings.lr:g} "
        f"and {settings.head_lr:g} of the linear layer ({scaled}) x{settings.gamma:g} at {list(settings.milestones)}, "
        f"{settings.epochs} epochs of batch {settings.batch_size}, weight decay {settings.weight_decay:g}, momentum "
        f"{settings.momentum:g}, random resized crops {settings.scale} and flip {settings.flip_p:g}; the last epoch is "
        f"the result; {task.protocol(num_train=len(rows))}{ten_crops_line(view, settings.test_views)}",
        ("epoch", "test top-1", "test top-5"),
        last_and_best(result, settings.epochs, task.test.split),
        {
            "protocol_settings": dataclasses.asdict(settings),
            "losses": result.losses,
            "best_epoch": result.best_epoch,
            "subset": {"images": len(rows), "sha256_of_rows": hashlib.sha256(rows.tobytes()).hexdigest()},
        },
        task.per_class(result.predicted),
    )


def _choose(task: Task, settings: FinetuneSettings) -> tuple[Rows, str]:
    """The rows to train on, and which they are in words. Raises ValueError if a class is left without an image."""
    labels = np.asarray(task.train.index()["label"], dtype=np.int64)
    if settings.subset_file:
        path = Path(settings.subset_file)
        rows, chosen = (
            rows_of_names(task.train, _names(path), settings.subset_file),
            f"the images listed in {path.name}",
        )
    elif settings.share == 1:
        rows, chosen = np.arange(task.train.num_samples), "all images"
    else:
        rows = rows_of_share(labels, settings.share, task.cfg.run.seed)
        chosen = f"{100 * settings.share:g} % of each class drawn by seed {task.cfg.run.seed}"
    missing = np.setdiff1d(np.arange(task.num_classes), labels[rows])
    if len(missing):
        name = (task.train.classes or ())[int(missing[0])]
        raise ValueError(
            f"{chosen} leaves {len(missing)} of {task.num_classes} classes without an image, the first is {name!r}; "
            "list at least one of each in evaluator.subset_file"
        )
    return rows, chosen


def _names(path: Path) -> list[str]:
    try:
        text = read_limited(path, MAX_LIST_BYTES).decode("utf-8")
        names = [line for line in (line.strip() for line in text.splitlines()) if line]
    except (OSError, ValueError) as error:
        raise ValueError(f"evaluator.subset_file {path} cannot be read ({error}); give a text file of names") from None
    require(bool(names), "evaluator.subset_file", str(path), "a list of file names, one a line")
    return names
