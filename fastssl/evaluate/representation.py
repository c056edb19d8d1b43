"""The health of a representation without labels: how many dimensions it uses, how it spreads, what views change.

RankMe                  Garrido et al., arXiv:2210.02885, eq. 1: of the features as they are, not centred
alignment, uniformity   Wang and Isola, arXiv:2005.10242, section 4.1: of features on the unit sphere
Departure: both papers measure what the projection head gives; here it is the backbone, which the other evaluators and
every later use take. Numbers of one width, of as many images and of the same data may be compared, others not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastssl import checkpoint, dist
from fastssl.config import convert
from fastssl.evaluate.features import block_rows, extract
from fastssl.evaluate.task import Report, Task, percent
from fastssl.losses import feature_std
from fastssl.settings import Config, require
from pipelines.loader import Batch, read_once
from pipelines.views import ViewSpec

# N images, D feature width

RANK_EPS = 1e-7  # RankMe's, for float32 features
NO_SPREAD = 1e-6  # of the features' root mean square: what float32 kernels make of equal images
CHUNK = 2048


@dataclass(frozen=True)
class RepresentationSettings:
    """pairs: images seen through two training views; uniformity: images whose pairs are compared; 0 takes all.

    dead    a feature is dead that varies, over the images, by no more than this share of the features' root mean square
    """

    name: Literal["representation"]
    pairs: int = 2048
    uniformity: int = 10_000
    dead: float = 1e-4

    def __post_init__(self) -> None:
        require(self.pairs >= 0, "evaluator.pairs", self.pairs, "0 (all images) or more")
        require(self.uniformity >= 0, "evaluator.uniformity", self.uniformity, "0 (all images) or more")
        require(0 <= self.dead < 1, "evaluator.dead", self.dead, "in [0, 1)")


def singular_values(features: Tensor) -> Tensor:
    """float64 (min(N, D),), largest first, of features (N, D).

    From the eigenvalues of the Gram matrix of the shorter side, in float64: next to the features, memory grows with
    min(N, D)^2. Values below 1e-8 of the largest are lost, a tenth of RankMe's own epsilon.
    """
    no_mean = torch.zeros(features.shape[1], dtype=torch.float64)
    return torch.linalg.eigvalsh(_gram(features, no_mean)).clamp(min=0).sqrt().flip(0)


def rank_me(values: Tensor) -> float:
    """exp of the entropy of the singular values' shares: 1 if one direction holds everything, their number if all are
    equal (slightly above, by the epsilon); 1 too where all values are 0."""
    total = values.sum()
    if total == 0:
        return 1.0
    shares = values / total + RANK_EPS
    return torch.exp(-(shares * shares.log()).sum()).item()


def effective_dimension(features: Tensor) -> float:
    """Participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of the covariance of features (N, D).

    D if they vary alike in all directions, 1 if in one, 0 if they do not vary.
    """
    mean = features.mean(0, dtype=torch.float64)
    gram = _gram(features, mean)
    variance = gram.trace()  # times N, as the sum of squares below is
    if variance <= NO_SPREAD**2 * (variance + len(features) * (mean * mean).sum()):
        return 0.0
    return (variance**2 / (gram * gram).sum()).item()


def dead_share(features: Tensor, below: float) -> float:
    """The share of the D features whose standard deviation over the images is at most `below` of the root mean square
    of all features."""
    columns = features.split(64, 1)  # float64 of some at a time
    variance = torch.cat([part.double().var(0, correction=0) for part in columns])
    mean_square = torch.cat([part.double().square().mean(0) for part in columns]).mean()
    return (variance <= below**2 * mean_square).double().mean().item()


def alignment(one: Tensor, other: Tensor) -> float:
    """Mean squared distance of two views' unit rows (N, D): 0 if augmentation changes nothing, 2 for unrelated rows."""
    return (one.double() - other.double()).square().sum(1).mean().item()


def uniformity(unit_rows: Tensor, t: float = 2.0) -> float:
    """log of the mean of exp(-t |x - y|^2) over all pairs of different rows of (N, D), N >= 2.

    0 if all are equal; -2t if all are at right angles, which a uniform spread nears as D grows. Exact; memory grows
    with a chunk of rows times N.
    """
    rows = unit_rows.double()
    squares = rows.square().sum(1)
    total = 0.0
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        apart = squares[part, None] + squares[None, start:] - 2 * rows[part] @ rows[start:].T
        total += torch.exp(-t * apart.clamp(min=0)).triu(1).sum().item()
    return math.log(total / (len(rows) * (len(rows) - 1) / 2))


def training_view(task: Task) -> ViewSpec | None:
    """The first training view of the run, drawn twice for each image; None without a run, or one it is like."""
    run = Path(task.cfg.like or (task.cfg.checkpoint if task.subject.step is not None else ""))
    if run == Path():
        return None
    folder = checkpoint.find(run.parent if run.is_file() else run)
    trained = convert(Config, checkpoint.load_settings(folder)).view_specs()
    return dataclasses.replace(trained[0], role="pair", count=2, same_as="")


def paired_features(task: Task, spec: ViewSpec, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Features (N, D) of the two views of `spec` of the samples `ids`, in the order of the ids.

    The same, bit for bit, for any number of ranks.
    """
    cfg = task.cfg
    batch_size = max(1, cfg.run.batch_size // 2)  # both views of an image go through the backbone at once
    mine = ids[block_rows(len(ids), batch_size, dist.rank(), dist.world())]
    batches: Iterator[Batch] = iter(())
    if len(mine):
        batches = read_once(
            task.train, [spec], batch_size=batch_size, backend=cfg.loader.backend, device=str(task.device),
            threads=cfg.loader.threads, output="uint8", rows=mine.numpy(), seed=cfg.run.seed,
        )  # fmt: skip
    both = extract(
        task.subject.backbone, map(_in_one, batches), device=task.device, precision=cfg.run.precision,
        mean=spec.augment.mean, std=spec.augment.std,
    )  # fmt: skip
    return both.features[0::2], both.features[1::2]


def evaluate_representation(task: Task, settings: RepresentationSettings) -> Report:
    features = task.features(task.train).features
    num_images, width = features.shape
    if num_images < 2:
        raise ValueError(f"{task.train.place} gives {num_images} image, but a spread needs 2 or more")
    seed = task.cfg.run.seed
    unit = functional.normalize(features, dim=1)
    compared = _some(num_images, settings.uniformity or num_images, seed)
    values = singular_values(features)
    metrics = {
        "rankme": rank_me(values),
        "effective_dimension": effective_dimension(features),
        "dead_features": dead_share(features, settings.dead),
        "feature_std": feature_std(unit).item(),
        "uniformity": uniformity(unit[compared]),
    }
    view, paired = training_view(task), "no alignment: there is no run to take training views from (give like=RUN)"
    if view is not None:
        ids = _some(num_images, settings.pairs or num_images, seed)
        one, other = paired_features(task, view, ids)
        metrics["alignment"] = alignment(functional.normalize(one, dim=1), functional.normalize(other, dim=1))
        paired = f"alignment between two training views of {len(ids):,} images, seed {seed}"
    test = task.subject.view
    rows = [(what, how(metrics[key]), meaning) for key, (what, how, meaning) in READING.items() if key in metrics]
    return Report(
        {f"representation/{key}": value for key, value in metrics.items()},
        f"{width} features of {task.subject.label}, {task.cfg.run.precision}, of {num_images:,} images of "
        f"{task.train.split} (no rank above {min(num_images, width)}), centre crop {test.size} px; uniformity over all "
        f"pairs of {len(compared):,} images; {paired}",
        ("measure", "value", "how to read it"),
        rows,
        {"singular_values": values.tolist()},
    )


def _plain(value: float) -> str:
    return f"{value:.4g}"


READING = {
    "rankme": ("RankMe", _plain, "1: one direction holds all; at most the width"),
    "effective_dimension": ("effective dimension", _plain, "of the covariance; 0: nothing varies"),
    "dead_features": ("dead features", percent, "the same for all images"),
    "feature_std": ("feature std", _plain, "0: collapsed; 1: spread over the sphere"),
    "uniformity": ("uniformity", _plain, "0: collapsed; -4: as far apart as can be; lower is better"),
    "alignment": ("alignment", _plain, "0: augmentation changes nothing; lower is better, but not alone"),
}


def _gram(features: Tensor, mean: Tensor) -> Tensor:
    """float64 (M, M), M = min(N, D): the products of the centred columns or, where these are longer, rows."""
    if len(features) >= features.shape[1]:
        parts = (part.double() - mean for part in features.split(CHUNK))
    else:
        parts = ((part.double() - m).T for part, m in zip(features.split(CHUNK, 1), mean.split(CHUNK)))
    side = min(features.shape)
    gram = torch.zeros(side, side, dtype=torch.float64)
    for part in parts:
        gram.addmm_(part.T, part)
    return gram


def _in_one(batch: Batch) -> Batch:
    """Both views as one batch, sample i's under the ids 2i and 2i + 1."""
    (views,) = batch.views.values()
    ids = torch.cat([2 * batch.ids, 2 * batch.ids + 1])
    return Batch({"both": [torch.cat(views)]}, batch.labels.repeat(2), ids, batch.step)


def _some(total: int, wanted: int, seed: int) -> Tensor:
    """All of `total` numbers, or `wanted` of them drawn by the seed; in order."""
    return dist.permutation(total, seed, 0)[:wanted].sort().values
