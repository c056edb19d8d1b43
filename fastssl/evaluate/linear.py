"""Linear classification on frozen features: a quick sweep that tunes itself, and the published protocols.

The published numbers (MoCo, arXiv:1911.05722; SwAV, arXiv:2006.09882) train one linear layer on augmented views for
100 epochs, and report the best epoch on the test set itself. Here the last epoch is the result, and the best one is
given beside it under that name. Departures: the samples that do not fill the last batch of an epoch are left out of
that epoch (another shuffle, other samples), and the test features are computed once, since nothing that makes them
changes.
"""

# B images of a batch, N samples, F feature width, C classes, H probes trained at once
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl import dist
from fastssl.evaluate.accuracy import place_of
from fastssl.evaluate.features import Features, Frozen, evaluating, forward, width_of
from fastssl.evaluate.per_class import predicted_class
from fastssl.nn.sync_batchnorm import sync_batchnorm_
from pipelines.loader import Batch

# -- the quick form: features once, then every learning rate and weight decay at once --


@dataclass(frozen=True)
class Probe:
    """One line of the sweep; accuracy on the held-out part of the training set, 0 if the probe diverged."""

    lr: float
    weight_decay: float
    held_out_top1: float
    diverged: bool


@dataclass(frozen=True)
class Sweep:
    """probes in the order tried; best was chosen by held-out accuracy alone; test accuracies are of the best only.

    retrained   whether the best pair was trained again on all training samples before the test
    at_edge     the best pair lies at an end of the range of learning rates: a wider one may give more
    predicted   int64 (N,) the class of each test sample
    """

    probes: tuple[Probe, ...]
    best: Probe
    top1: float
    top5: float
    retrained: bool
    at_edge: bool
    predicted: Tensor = field(repr=False, compare=False)


def sweep(
    train: Features,
    test: Features,
    *,
    num_classes: int,
    lrs: Sequence[float],
    weight_decays: Sequence[float],
    epochs: int = 30,
    batch_size: int = 256,
    momentum: float = 0.9,
    held_out: float = 0.1,
    standardize: bool = True,
    retrain: bool = True,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Sweep:
    """Train a probe for each pair of learning rate and weight decay, choose one by a held-out part of train, test that.

    held_out    share of each class of `train` that no probe sees before it is judged
    standardize each feature to mean 0 and deviation 1 over the samples that train, so that one range of learning rates
                serves backbones of any feature scale
    Raises ValueError for an empty sweep, or classes too small to hold any sample out.
    """
    if not lrs or not weight_decays:
        raise ValueError("evaluator.lr and evaluator.weight_decay must each hold at least one number")
    pairs = [(lr, weight_decay) for lr in lrs for weight_decay in weight_decays]
    fit_rows, held_rows = stratified_split(train.labels, held_out, seed)

    def trained(data: Features, pairs: Sequence[tuple[float, float]]) -> tuple[Heads, Standardize]:
        scale = Standardize.of(data.features) if standardize else Standardize.identity(data.features)
        heads = train_heads(
            scale(data.features), data.labels, num_classes, pairs,
            epochs=epochs, batch_size=batch_size, momentum=momentum, seed=seed, device=device,
        )  # fmt: skip
        return heads, scale

    heads, scale = trained(train.subset(fit_rows), pairs)
    judged = train.subset(held_rows)
    accuracies = heads.top1_top5(scale(judged.features), judged.labels)[:, 0].tolist()
    outcomes = zip(pairs, accuracies, heads.diverged().tolist(), strict=True)
    probes = tuple(Probe(*pair, 0.0 if bad else top1, bad) for pair, top1, bad in outcomes)
    chosen = max(range(len(probes)), key=lambda i: (probes[i].held_out_top1, -i))  # of equals the first tried
    if retrain:
        heads, scale = trained(train, [pairs[chosen]])
    tested = judge(lambda x: heads.logits(scale(x))[:, 0 if retrain else chosen], test, heads.bias.device)
    best = probes[chosen]
    return Sweep(
        probes=probes,
        best=best,
        top1=tested.top1,
        top5=tested.top5,
        retrained=retrain,
        at_edge=len(lrs) > 1 and best.lr in (min(lrs), max(lrs)),
        predicted=tested.predicted,
    )


@dataclass(frozen=True)
class Judged:
    """Accuracies as fractions of the samples, and predicted int64 (N,), the class of each, on the CPU."""

    top1: float
    top5: float
    predicted: Tensor


@torch.no_grad()
def judge(logits: Callable[[Tensor], Tensor], test: Features, device: torch.device | str) -> Judged:
    """What `logits`, (B, F) -> (B, C) on `device`, makes of the test features."""
    places, predicted = [], []
    for rows in torch.arange(len(test)).split(1024):
        scores = logits(test.features[rows].to(device))
        places.append(place_of(scores, test.labels[rows].to(device)).cpu())
        predicted.append(predicted_class(scores).cpu())
    place = torch.cat(places)
    return Judged((place < 1).double().mean().item(), (place < 5).double().mean().item(), torch.cat(predicted))


def stratified_split(labels: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers to fit and to hold out: `held_out` of each class, rounded, at least 1 where a class has 2 or more."""
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"evaluator.held_out is {held_out}, but must be a share between 0 and 1, such as 0.1")
    rng = np.random.default_rng(seed)
    held = []
    for rows in (np.flatnonzero(labels.numpy() == c) for c in labels.unique().numpy()):
        count = min(max(1, round(held_out * len(rows))), len(rows) - 1)
        held.append(rng.permutation(rows)[:count])
    held_rows = np.sort(np.concatenate(held))
    if len(held_rows) == 0:
        raise ValueError("no class of the training set has two samples, so none can be held out to choose the lr by")
    fit_rows = np.setdiff1d(np.arange(len(labels)), held_rows)
    return torch.from_numpy(fit_rows), torch.from_numpy(held_rows)


@dataclass(frozen=True)
class Standardize:
    """Subtract `mean` (F,), multiply with `scale` (F,); a feature that never varies becomes 0."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standardize:
        deviation, mean = torch.std_mean(features, dim=0, correction=0)
        varies = deviation > 1e-6 * mean.abs().clamp_min(torch.finfo(features.dtype).tiny)
        return cls(mean, torch.where(varies, 1 / deviation, 0.0))

    @classmethod
    def identity(cls, features: Tensor) -> Standardize:
        return cls(torch.zeros_like(features[0]), torch.ones_like(features[0]))

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale


@dataclass(frozen=True)
class Heads:
    """H linear layers in one: weight (H, C, F) and bias (H, C), each as in `nn.Linear`."""

    weight: Tensor
    bias: Tensor

    def logits(self, x: Tensor) -> Tensor:
        """(B, F) -> (B, H, C), one matrix product for all heads."""
        return (x @ self.weight.flatten(0, 1).T).unflatten(1, self.bias.shape) + self.bias

    def top1_top5(self, features: Tensor, labels: Tensor) -> Tensor:
        """Accuracies (H, 2) as fractions of the rows."""
        hits = torch.zeros(len(self.bias), 2)
        for rows in torch.arange(len(labels)).split(1024):
            logits = self.logits(features[rows].to(self.weight.device))
            truth = labels[rows].to(self.weight.device)[:, None].expand(-1, len(self.bias))
            place = place_of(logits, truth).cpu()
            hits += torch.stack([(place < 1).sum(0), (place < 5).sum(0)], dim=1)
        return hits / len(labels)

    def diverged(self) -> Tensor:
        """(H,) bool: whether a weight or bias is not finite."""
        return ~(self.weight.isfinite().all(dim=(1, 2)) & self.bias.isfinite().all(dim=1)).cpu()


@torch.no_grad()
def train_heads(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    pairs: Sequence[tuple[float, float]],
    *,
    epochs: int,
    batch_size: int,
    momentum: float,
    seed: int,
    device: torch.device | str = "cpu",
) -> Heads:
    """H = len(pairs) probes, each as if trained alone by SGD on cross-entropy with its own (lr, weight decay).

    From zero weights, which is as good as any start for a convex loss; the learning rate falls to 0 along a cosine step
    by step; all probes see the same batches. The gradient of cross-entropy is (softmax - one-hot) times the input,
    written out here since it turns 2 H small products into 2 large ones. Features may stay in host memory.
    """
    heads, width = len(pairs), features.shape[1]
    lr, decay = (torch.tensor(column, dtype=features.dtype, device=device) for column in zip(*pairs, strict=True))
    weight = torch.zeros(heads, num_classes, width, dtype=features.dtype, device=device)
    bias = torch.zeros(heads, num_classes, dtype=features.dtype, device=device)
    weight_velocity, bias_velocity = torch.zeros_like(weight), torch.zeros_like(bias)
    model = Heads(weight, bias)
    total = epochs * math.ceil(len(labels) / batch_size)
    for step, rows in enumerate(shuffled_batches(len(labels), batch_size, epochs, seed)):
        x, y = features[rows].to(device), labels[rows].to(device)
        error = model.logits(x)
        error = (error - error.amax(2, keepdim=True)).exp_()  # torch's softmax takes 5 times as long where C is 10
        error /= error.sum(2, keepdim=True)
        error[torch.arange(len(rows)), :, y] -= 1.0
        error /= len(rows)
        lr_now = lr * (0.5 * (1 + math.cos(math.pi * step / total)))
        gradient = (error.flatten(1).T @ x).view_as(weight)
        _sgd_(weight, gradient, weight_velocity, lr_now[:, None, None], decay[:, None, None], momentum)
        _sgd_(bias, error.sum(0), bias_velocity, lr_now[:, None], decay[:, None], momentum)
    return model


def _sgd_(value: Tensor, gradient: Tensor, velocity: Tensor, lr: Tensor, decay: Tensor, momentum: float) -> None:
    """torch.optim.SGD's step without dampening or Nesterov, with a learning rate and weight decay per head."""
    velocity.mul_(momentum).add_(gradient).add_(decay * value)
    value.sub_(lr * velocity)


def shuffled_batches(num_samples: int, batch_size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Rows of each batch, a new permutation every epoch, the last batch of an epoch shorter."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        yield from torch.randperm(num_samples, generator=generator).split(batch_size)


# -- the published protocols: augmented views, one learning rate, many epochs --


@dataclass(frozen=True)
class LinearProtocol:
    """How one linear layer is trained. Defaults are MoCo's.

    batch_size  global; lr is for this batch unless scale_lr multiplies it with batch_size / 256
    schedule    per epoch: "step" multiplies with gamma at each of milestones, "cosine" falls to final_lr at `epochs`
    init_std    of the weights' normal start; the bias starts at 0
    batch_norm  the channels are normalised over the batch, and over all ranks, before the layer
    """

    lr: float = 30.0
    weight_decay: float = 0.0
    momentum: float = 0.9
    epochs: int = 100
    batch_size: int = 256
    schedule: Literal["step", "cosine"] = "step"
    milestones: tuple[int, ...] = (60, 80)
    gamma: float = 0.1
    final_lr: float = 0.0
    init_std: float = 0.01
    scale_lr: bool = False
    batch_norm: bool = False

    def lr_at(self, epoch: int) -> float:
        base = self.lr * self.batch_size / 256 if self.scale_lr else self.lr
        if self.schedule == "cosine":
            return self.final_lr + (base - self.final_lr) * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))
        return base * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class Trained:
    """Accuracies on the test split. best_* is chosen on the test split itself, as published tables do.

    losses      the mean of each epoch
    predicted   int64 (N,) the class of each test sample after the last epoch
    """

    top1: float
    top5: float
    best_top1: float
    best_epoch: int
    losses: tuple[float, ...]
    predicted: Tensor = field(repr=False, compare=False)

    @classmethod
    def of(cls, epochs: Sequence[Judged], losses: Sequence[float]) -> Trained:
        """From every epoch's accuracies and loss; of equally good epochs the first is the best."""
        best = max(range(len(epochs)), key=lambda e: (epochs[e].top1, -e))
        last = epochs[-1]
        return cls(last.top1, last.top5, epochs[best].top1, best + 1, tuple(losses), last.predicted)


class TrainingBatches(Protocol):
    """What is used of `pipelines.loader.Loader`."""

    steps_per_epoch: int

    def batches(self, start_step: int = 0) -> Iterator[Batch]: ...


def train_linear(
    backbone: nn.Module,
    loader: TrainingBatches,
    test: Features,
    *,
    num_classes: int,
    protocol: LinearProtocol,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    mean: Sequence[float],
    std: Sequence[float],
    seed: int = 0,
    channels: int = 0,
    on_epoch: Callable[[int, float, float], None] = lambda epoch, loss, top1: None,
) -> Trained:
    """Train a linear layer on the backbone's features of the loader's views; the backbone is frozen and in eval mode.

    channels    for protocol.batch_norm: of the map that the features were made of; 0 takes each feature for one
    The loader yields this rank's part of each global batch. on_epoch is told (epoch from 1, mean loss, test top-1).
    Raises RuntimeError if any tensor of the backbone has changed after the first epoch or at the end, and ValueError if
    the loss is no longer finite.
    """
    width = width_of(backbone)
    head: nn.Module = initial_head(width, num_classes, protocol.init_std, seed)
    if protocol.batch_norm:
        head = normalized(head, channels or width)
    head.to(device)
    optimizer = torch.optim.SGD(
        head.parameters(), lr=protocol.lr_at(0), momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    frozen = Frozen(backbone)
    batches = loader.batches()
    losses: list[float] = []
    judged: list[Judged] = []
    with evaluating(backbone):
        for epoch in range(protocol.epochs):
            for group in optimizer.param_groups:
                group["lr"] = protocol.lr_at(epoch)
            total = torch.zeros((), device=device)
            for _ in range(loader.steps_per_epoch):
                batch = next(batches)
                (images,) = next(iter(batch.views.values()))
                with torch.no_grad():
                    x = forward(backbone, images, device=device, precision=precision, mean=mean, std=std)
                loss = functional.cross_entropy(head(x), batch.labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                _average_gradients_(head)
                optimizer.step()
                total += loss.detach()
            losses.append(float(dist.all_reduce_mean(total)) / loader.steps_per_epoch)
            if not math.isfinite(losses[-1]):
                raise ValueError(
                    f"the probe's loss is {losses[-1]} in epoch {epoch + 1}; lower evaluator.lr={protocol.lr}"
                )
            with evaluating(head):
                judged.append(judge(head, test, device))
            on_epoch(epoch + 1, losses[-1], judged[-1].top1)
            if epoch == 0:
                frozen.check("during the first epoch")
    frozen.check("by the last epoch")
    return Trained.of(judged, losses)


def initial_head(width: int, num_classes: int, init_std: float, seed: int) -> nn.Linear:
    """Weights from a normal distribution, bias 0, the same on every rank and whatever else drew random numbers."""
    head = nn.utils.skip_init(nn.Linear, width, num_classes)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(num_classes, width, generator=generator) * init_std)
        head.bias.zero_()
    return head


def normalized(head: nn.Module, channels: int) -> nn.Module:
    """`head` after a batch norm over `channels`, whose values stand together in a row of features (SwAV's use_bn)."""
    norm = nn.Sequential(nn.Unflatten(1, (channels, -1)), nn.BatchNorm1d(channels), nn.Flatten(), head)
    return sync_batchnorm_(norm) if dist.world() > 1 else norm


def _average_gradients_(module: nn.Module) -> None:
    """The mean over ranks: two small tensors, not worth a DDP wrapper."""
    for parameter in module.parameters():
        assert parameter.grad is not None
        parameter.grad = dist.all_reduce_mean(parameter.grad)
