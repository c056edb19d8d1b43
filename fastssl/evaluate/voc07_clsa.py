"""VOC07 as CLSA's authors evaluate it (arXiv:2104.07713): one layer on the backbone, trained on augmented pictures.

The protocol of their VOC_CLF code, with its oddities, which numbers of theirs can only be compared under:
- its "mAP" is the mean over images of the AP of one image's 20 scores; VOC's is the mean over classes. Both are given.
- batch norm of the frozen backbone stays in train mode, so that its statistics drift towards VOC; here those of a copy.
  Validation and test use what they have drifted to.
- the cosine has a period of 24 epochs: the learning rate rises and falls four times in 100.
- a class with difficult objects only is a negative, in training and in both tests.
Chosen is the epoch with the best "mAP" on val; test scores are the mean over five crops.
"""

# B images of a batch, N images of a split, C classes, S side of a crop in px
from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import functional as pictures

from fastssl import dist
from fastssl.evaluate.average_precision import average_precision
from fastssl.evaluate.features import width_of
from fastssl.evaluate.settings import EvaluateConfig
from fastssl.evaluate.task import Report, Task, percent
from fastssl.evaluate.voc07 import multi_label_splits
from fastssl.precision import autocast
from fastssl.settings import require
from pipelines.loader import available_cores
from shard_tools.extract import read_image
from shard_tools.headers import FORMATS
from shard_tools.manifest import Manifest

MEAN, STD = (0.4573, 0.4388, 0.4073), (0.2675, 0.2638, 0.2777)  # of VOC07, as their code has them


@dataclass(frozen=True)
class ClsaSettings:
    """size: side of the crops, resize: of the test images before, in px. period: epochs from the peak to 0."""

    name: Literal["voc07_clsa"]
    epochs: int = 100
    batch_size: int = 16
    lr: float = 0.05
    momentum: float = 0.9
    period: int = 12
    size: int = 300
    resize: int = 330

    def __post_init__(self) -> None:
        for key in ("epochs", "batch_size", "period", "size"):
            require(getattr(self, key) >= 1, f"evaluator.{key}", getattr(self, key), "1 or more")
        require(self.lr > 0, "evaluator.lr", self.lr, "above 0")
        require(0 <= self.momentum < 1, "evaluator.momentum", self.momentum, "in [0, 1)")
        require(self.resize >= self.size, "evaluator.resize", self.resize, f"evaluator.size, {self.size}, or more")

    def lr_at(self, epoch: int) -> float:
        """Of epoch 0, 1, ...: their scheduler steps at each epoch's start, so that the first is not the peak."""
        return self.lr * (1 + math.cos(math.pi * (epoch + 1) / self.period)) / 2


def train_and_test(cfg: EvaluateConfig) -> tuple[Manifest, Manifest]:
    """The splits train and test; val, beside train, is read by the evaluator."""
    data = cfg.data
    test = Manifest.load(data.test_root or data.root, data.test_split or "test", data.remote)
    return multi_label_splits(Manifest.load(data.root, data.split, data.remote), test)


def training_picture(payload: bytes, size: int, rng: np.random.Generator) -> Tensor:
    """(3, S, S) normalised: squeezed to S x S, brightness or (one in four) grey, flipped one in four, turned by 25."""
    image = pictures.resize(_opened(payload), [size, size])
    if rng.random() < 0.5:
        image = pictures.adjust_brightness(image, rng.uniform(0.8, 1.2))
    elif rng.random() < 0.25:
        image = pictures.rgb_to_grayscale(image, 3)
    if rng.random() < 0.25:
        image = pictures.hflip(image)
    return _normalised(pictures.rotate(image, rng.uniform(-25, 25)))


def evaluation_pictures(payload: bytes, size: int, resize: int, five: bool) -> Tensor:
    """(1 or 5, 3, S, S) normalised: the shorter side to `resize`, then the centre, or the corners and the centre."""
    image = pictures.resize(_opened(payload), resize)
    crops = pictures.five_crop(image, [size, size]) if five else (pictures.center_crop(image, [size, size]),)
    return torch.stack([_normalised(crop) for crop in crops])


def map_over_images(scores: npt.NDArray[Any], present: npt.NDArray[np.bool_]) -> float:
    """Their "mAP": the mean over images of the AP of an image's C scores (N, C); 0 for an image without a class."""
    aps = [average_precision(s, p).uninterpolated if p.any() else 0.0 for s, p in zip(scores, present, strict=True)]
    return float(np.mean(aps))


def evaluate_clsa(task: Task, settings: ClsaSettings) -> Report:
    cfg, seed = task.cfg, task.cfg.run.seed
    if dist.world() > 1:
        raise ValueError("voc07_clsa trains with batch norm over its whole small batch; run it without torchrun")
    if cfg.data.limit:
        raise ValueError(f"data.limit is {cfg.data.limit}, but voc07_clsa trains on whole epochs; leave it at 0")
    classes = task.train.classes or ()
    val = Manifest.load(cfg.data.root, "val", cfg.data.remote)
    multi_label_splits(task.train, val)
    backbone = copy.deepcopy(task.subject.backbone).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(width_of(backbone), len(classes))
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
    model = nn.Sequential(backbone, head).to(task.device)

    def scores_of(manifest: Manifest, five: bool) -> npt.NDArray[np.float32]:
        return _scores(model, manifest, settings, five, task.device, cfg.run.precision)

    optimizer = torch.optim.SGD(head.parameters(), lr=settings.lr, momentum=settings.momentum)
    best, best_epoch, kept, losses, val_maps = -1.0, 0, {}, [], []
    for epoch in range(settings.epochs):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr_at(epoch)
        losses.append(_train_epoch(model, optimizer, task.train, settings, epoch, seed, task.device, cfg.run.precision))
        val_maps.append(map_over_images(scores_of(val, five=False), val.labels() == 1))
        if val_maps[-1] > best:
            best, best_epoch = val_maps[-1], epoch + 1
            kept = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(kept)
    scores, truth = scores_of(task.test, five=True), np.asarray(task.test.labels())
    for number, name in enumerate(classes):
        if not (truth[:, number] == 1).any():
            raise ValueError(f"no image of {task.test.place} shows the class {name!r}; pack a test split that has all")
    # VOC's own measure passes over difficult images; theirs takes them for negatives
    aps = [average_precision(scores[:, number], truth[:, number]) for number in range(len(classes))]
    metrics = {
        "voc07_clsa/map_over_images": map_over_images(scores, truth == 1),
        "voc07_clsa/map": float(np.mean([ap.area for ap in aps])),
        "voc07_clsa/map_11point": float(np.mean([ap.eleven_point for ap in aps])),
        "voc07_clsa/val_map_over_images": best,
    }
    rows = [(name, percent(ap.area), percent(ap.eleven_point)) for name, ap in zip(classes, aps, strict=True)]
    mean = ("mean over classes", percent(metrics["voc07_clsa/map"]), percent(metrics["voc07_clsa/map_11point"]))
    odd = ('mean over images (their "mAP")', percent(metrics["voc07_clsa/map_over_images"]), "")
    return Report(
        metrics,
        f"CLSA's own VOC07 protocol: one layer, SGD lr {settings.lr:g} (cosine up and down in {2 * settings.period} "
        f"epochs), batch {settings.batch_size}, {settings.epochs} epochs on {task.train.num_samples:,} images of "
        f"{task.train.split} at {settings.size} px, batch norm in train mode, epoch {best_epoch} chosen on "
        f"{val.num_samples:,} of val, five crops of {task.test.num_samples:,} of {task.test.split}; "
        f"{width_of(backbone)} features of {task.subject.label}, {cfg.run.precision}",
        ("class", "AP (area)", "AP (11 points)"),
        [*rows, mean, odd],
        {"best_epoch": best_epoch, "losses": losses, "val_map_over_images": val_maps},
    )


def _train_epoch(
    model: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    manifest: Manifest,
    settings: ClsaSettings,
    epoch: int,
    seed: int,
    device: torch.device,
    precision: str,
) -> float:
    """The mean loss an image: binary cross-entropy, summed over the batch and the classes for the gradient."""

    def picture(row: int, payload: bytes) -> Tensor:
        return training_picture(payload, settings.size, np.random.default_rng([seed, epoch, row]))

    backbone, head = model
    backbone.train()
    labels = torch.from_numpy(np.asarray(manifest.labels() == 1)).float()
    order, total = dist.permutation(manifest.num_samples, seed, epoch), torch.zeros((), device=device)
    for rows, images in _batches(manifest, order, settings.batch_size, picture):
        with torch.no_grad(), autocast(precision, device):
            features = backbone(images.to(device)).float()
        loss = functional.binary_cross_entropy_with_logits(head(features), labels[rows].to(device), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    mean = total.item() / manifest.num_samples
    if not math.isfinite(mean):
        raise ValueError(f"the loss of epoch {epoch + 1} is {mean}; lower evaluator.lr, which is {settings.lr:g}")
    return mean


@torch.no_grad()
def _scores(
    model: nn.Sequential, manifest: Manifest, settings: ClsaSettings, five: bool, device: torch.device, precision: str
) -> npt.NDArray[np.float32]:
    """(N, C): logits of every image, averaged over its crops."""

    def picture(row: int, payload: bytes) -> Tensor:
        return evaluation_pictures(payload, settings.size, settings.resize, five)

    model.eval()
    found = []
    for _, images in _batches(manifest, torch.arange(manifest.num_samples), settings.batch_size, picture):
        num_images, crops = images.shape[:2]
        with autocast(precision, device):
            logits = model(images.flatten(0, 1).to(device)).float()
        found.append(logits.view(num_images, crops, -1).mean(1).cpu())
    return torch.cat(found).numpy()


def _batches(
    manifest: Manifest, order: Tensor, batch_size: int, picture: Callable[[int, bytes], Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, stacked pictures) in this order; the next batch is drawn while one is used."""
    index = manifest.index()

    def one(row: int) -> Tensor:
        return picture(row, read_image(manifest, index, row))

    parts = order.split(batch_size)
    with ThreadPoolExecutor(available_cores()) as pool:
        coming = [pool.map(one, part.tolist()) for part in parts[:1]]
        for part, following in zip(parts, [*parts[1:], None]):
            images = torch.stack(list(coming.pop()))
            if following is not None:
                coming.append(pool.map(one, following.tolist()))
            yield part, images


def _opened(payload: bytes) -> Image.Image:
    return Image.open(io.BytesIO(payload), formats=FORMATS).convert("RGB")


def _normalised(image: Image.Image) -> Tensor:
    return pictures.normalize(pictures.to_tensor(image), MEAN, STD)
