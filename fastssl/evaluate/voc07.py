"""VOC07 classification by linear SVMs on frozen features, on all training images and on a few of each class.

The protocols of Goyal et al. (arXiv:1905.01235) as VISSL runs them; see svm.py. Published 87 to 89 mAP are of the last
layer of a ResNet-50, average-pooled, shorter side 256 px, centre crop 224 px, trained on trainval, tested on test.
"""

# N images, C classes, V costs, D draws
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from fastssl import dist
from fastssl.evaluate import svm
from fastssl.evaluate.average_precision import average_precision
from fastssl.evaluate.settings import EvaluateConfig
from fastssl.evaluate.task import Report, Task, percent
from fastssl.settings import require
from pipelines.loader import available_cores
from shard_tools.manifest import Manifest, ShardError, splits

Labels = npt.NDArray[np.int8]


@dataclass(frozen=True)
class VocSettings:
    """As svm.SvmProtocol. jobs: classes fitted at once on each rank; 0 takes all cores."""

    name: Literal["voc07"]
    costs: tuple[float, ...]
    folds: int = 3
    max_iter: int = 2000
    positive_weight: float = 2.0
    difficult: Literal["negative", "ignored"] = "negative"
    jobs: int = 0

    def __post_init__(self) -> None:
        require(self.folds >= 2, "evaluator.folds", self.folds, "2 or more")
        require_svm(self.costs, self.max_iter, self.positive_weight, self.jobs)


@dataclass(frozen=True)
class LowShotSettings:
    """k images of each class and `draws` independent choices of them; `cost` is the headline's, `costs` the others."""

    name: Literal["voc07_lowshot"]
    k: tuple[int, ...]
    costs: tuple[float, ...]
    cost: float = 1.0
    draws: int = 5
    max_iter: int = 2000
    positive_weight: float = 2.0
    jobs: int = 0

    def __post_init__(self) -> None:
        require(bool(self.k) and min(self.k) >= 1, "evaluator.k", list(self.k), "numbers of images, 1 or more")
        require(max(self.k) < 10_000, "evaluator.k", list(self.k), "numbers below 10,000")
        require(1 <= self.draws < 10_000, "evaluator.draws", self.draws, "1 or more, below 10,000")
        require_svm(self.costs, self.max_iter, self.positive_weight, self.jobs)
        require(self.cost in self.costs, "evaluator.cost", self.cost, f"one of evaluator.costs, {list(self.costs)}")


def require_svm(costs: tuple[float, ...], max_iter: int, positive_weight: float, jobs: int) -> None:
    require(bool(costs) and min(costs) > 0, "evaluator.costs", list(costs), "costs above 0")
    require(max_iter >= 1, "evaluator.max_iter", max_iter, "1 or more")
    require(positive_weight > 0, "evaluator.positive_weight", positive_weight, "above 0")
    require(jobs >= 0, "evaluator.jobs", jobs, "0 (all cores) or more")


def trainval_and_test(cfg: EvaluateConfig) -> tuple[Manifest, Manifest]:
    """The splits trainval and test, unless data.split and data.test_split name others.

    The default data.split, train, means trainval where that is packed; for the half, give its own folder as data.root.
    """
    data = cfg.data
    whole = data.split == "train" and "trainval" in splits(data.root, data.remote)
    return multi_label_splits(
        Manifest.load(data.root, "trainval" if whole else data.split, data.remote),
        Manifest.load(data.test_root or data.root, data.test_split or "test", data.remote),
    )


def multi_label_splits(train: Manifest, test: Manifest) -> tuple[Manifest, Manifest]:
    """The two; ShardError unless both have several labels an image, of the same classes."""
    for manifest in (train, test):
        if not manifest.multi_label:
            raise ShardError(
                f"{manifest.place} has not several labels an image; pack VOC with `shard_tools pack voc07`"
            )
    if train.classes != test.classes:
        raise ShardError(f"{train.place} and {test.place} have different classes; pack both from the same devkit")
    return train, test


def evaluate_voc07(task: Task, settings: VocSettings) -> Report:
    train, labels, test, test_labels = _data(task)
    classes = task.train.classes or ()
    protocol = svm.SvmProtocol(
        settings.costs, settings.folds, settings.max_iter, settings.positive_weight, settings.difficult,
        task.cfg.run.seed,
    )  # fmt: skip
    for number, name in enumerate(classes):
        _require_positives(name, labels[:, number], settings.folds, task.train)
        _require_positives(name, test_labels[:, number], 1, task.test)

    def fit(number: int) -> tuple[Any, ...]:
        return train, labels[:, number], test, protocol

    def flat(fitted: svm.Fitted) -> npt.NDArray[np.float64]:
        return np.concatenate([[fitted.num_unconverged, fitted.cost], fitted.held_out, fitted.scores])

    found = _every_class(svm.fit_class, fit, flat, 2 + len(settings.costs) + len(test), len(classes), settings.jobs)
    cut, costs, scores = int(found[:, 0].sum()), found[:, 1], found[:, 2 + len(settings.costs) :]
    held_out = found[:, 2 : 2 + len(settings.costs)].max(axis=1)
    aps = [average_precision(scores[number], test_labels[:, number]) for number in range(len(classes))]
    rows = [
        (name, str(int((test_labels[:, c] == 1).sum())), f"{costs[c]:g}", percent(held_out[c]), percent(aps[c].area),
         percent(aps[c].eleven_point))
        for c, name in enumerate(classes)
    ]  # fmt: skip
    area, eleven = (float(np.mean([getattr(ap, kind) for ap in aps])) for kind in ("area", "eleven_point"))
    mean = ("mean", "", "", percent(held_out.mean()), percent(area), percent(eleven))
    edges = [name for name, cost in zip(classes, costs) if cost in (min(settings.costs), max(settings.costs))]
    at_edge = f"; {len(edges)} classes chose the first or last cost" if edges else ""
    return Report(
        {
            "voc07/map": area,
            "voc07/map_11point": eleven,
            "voc07/map_uninterpolated": float(np.mean([ap.uninterpolated for ap in aps])),
            "voc07/held_out_map": float(held_out.mean()),
        },
        f"VOC07 linear SVMs, one a class, squared hinge, positives weighted {settings.positive_weight:g}, cost of "
        f"{len(settings.costs)} by {settings.folds}-fold AP{at_edge}; mAP is the mean over classes of VOC's AP, by "
        f"area and by 11 points; difficult images {_DIFFICULT[settings.difficult]} and never tested; unit rows; "
        f"{_cut(cut, len(classes) * (settings.folds * len(settings.costs) + 1), settings.max_iter)}{task.protocol()}",
        ("class", "test images", "cost", "held-out AP", "AP (area)", "AP (11 points)"),
        [*rows, mean],
        {
            "per_class": {
                name: {"area": ap.area, "eleven_point": ap.eleven_point, "uninterpolated": ap.uninterpolated,
                       "cost": cost, "held_out": held}
                for name, ap, cost, held in zip(classes, aps, costs.tolist(), held_out.tolist())
            },
            "num_unconverged": cut,
        },
    )  # fmt: skip


def evaluate_low_shot(task: Task, settings: LowShotSettings) -> Report:
    train, labels, test, test_labels = _data(task)
    classes, seed = task.train.classes or (), task.cfg.run.seed
    protocol = svm.SvmProtocol(settings.costs, 0, settings.max_iter, settings.positive_weight, seed=seed)
    choices = []  # of every class: the rows of each k and draw
    for number, name in enumerate(classes):
        _require_positives(name, test_labels[:, number], 1, task.test)
        try:
            choices.append(
                [
                    svm.low_shot_rows(labels[:, number], k, len(classes), (seed, draw, number))
                    for k in settings.k
                    for draw in range(settings.draws)
                ]
            )
        except ValueError as error:
            raise ValueError(f"of class {name!r} {error}; lower evaluator.k, which is {list(settings.k)}") from None

    def fit(number: int) -> tuple[Any, ...]:
        return train, labels[:, number], test, test_labels[:, number], choices[number], protocol

    def flat(found: tuple[npt.NDArray[np.float64], int]) -> npt.NDArray[np.float64]:
        return np.concatenate([[found[1]], found[0].ravel()])

    shape = (len(settings.k), settings.draws, len(settings.costs))
    found = _every_class(svm.low_shot_aps, fit, flat, 1 + int(np.prod(shape)), len(classes), settings.jobs)
    cut = int(found[:, 0].sum())
    maps = found[:, 1:].reshape(len(classes), *shape).mean(axis=0)  # (k, D, V)
    at = settings.costs.index(settings.cost)
    best = maps.mean(axis=1).argmax(axis=1)  # of every k: the cost whose mean over the draws is best, on the test
    metrics, rows = {}, []
    for number, k in enumerate(settings.k):
        mine, chosen = maps[number, :, at], maps[number, :, best[number]]
        metrics[f"voc07_lowshot/k{k}/map"] = float(mine.mean())
        metrics[f"voc07_lowshot/k{k}/map_std"] = float(mine.std())
        metrics[f"voc07_lowshot/k{k}/map_cost_chosen_on_test"] = float(chosen.mean())
        rows.append(
            (str(k), percent(mine.mean()), percent(mine.min()), percent(mine.max()), percent(mine.std()),
             percent(chosen.mean()), f"{settings.costs[best[number]]:g}")
        )  # fmt: skip
    return Report(
        metrics,
        f"VOC07 low-shot linear SVMs: k images of each class and k negatives for each other class, {settings.draws} "
        f"draws, cost {settings.cost:g} for all (published tables choose the cost on the test, which is the last "
        f"column but one); mAP is the mean over classes of VOC's AP by area; std over draws; "
        f"{_cut(cut, len(classes) * int(np.prod(shape)), settings.max_iter)}{task.protocol()}",
        ("k", "mAP", "lowest", "highest", "std", "mAP, cost chosen on test", "that cost"),
        rows,
        {"map_of_k_draw_cost": maps.tolist(), "costs": list(settings.costs), "num_unconverged": cut},
    )


_DIFFICULT = {"negative": "train as negatives, as in the published code,", "ignored": "are not trained on"}


def _cut(num: int, of: int, max_iter: int) -> str:
    return f"{num} of {of:,} fits stopped at {max_iter} iterations; " if num else ""


def _data(task: Task) -> tuple[npt.NDArray[np.float64], Labels, npt.NDArray[np.float64], Labels]:
    """(features, labels) of the training split and of the test split, features of unit length."""
    parts: list[Any] = []
    for manifest in (task.train, task.test):
        found = task.features(manifest)
        parts += [svm.unit_length(found.features.numpy()), np.asarray(manifest.labels()[found.ids.numpy()])]
    return parts[0], parts[1], parts[2], parts[3]


def _require_positives(name: str, labels: Labels, least: int, manifest: Manifest) -> None:
    num = int((labels == 1).sum())
    if num < least:
        raise ValueError(
            f"{num} of the {len(labels):,} images of {manifest.place} show the class {name!r}, but {least} must; pack "
            f"more images, or raise data.limit"
        )


def _every_class(
    work: Callable[..., Any],
    task_of: Callable[[int], tuple[Any, ...]],
    flat: Callable[[Any], npt.NDArray[np.float64]],
    width: int,
    num_classes: int,
    jobs: int,
) -> npt.NDArray[np.float64]:
    """(C, width): flat(work(*task_of(c))) of every class c, shared by the ranks, on all of them.

    In rounds of `jobs` classes a rank: a rank that waited for all the others' classes could meet the group's timeout.
    """
    jobs = int(str(dist.main_says(jobs or available_cores())))
    found = torch.zeros(num_classes, width, dtype=torch.float64)
    for first in range(0, num_classes, jobs * dist.world()):
        mine = range(first, min(first + jobs * dist.world(), num_classes))[dist.rank() :: dist.world()]
        part = torch.zeros_like(found)
        for number, result in zip(mine, svm.in_processes(work, map(task_of, mine), jobs), strict=True):
            part[number] = torch.from_numpy(flat(result))
        found += dist.all_reduce_sum(part)
    return found.numpy()
