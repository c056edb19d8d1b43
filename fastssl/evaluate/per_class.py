"""Which classes a classifier finds, and what it takes the others for: the table behind a top-1 accuracy.

Counted in torch instead of by a metrics library: two lines of `bincount` and `unique`, and a table of 21,000 classes,
whose whole confusion matrix would take 3.5 GB, needs no more than its own rows.
"""

# N samples, C classes
from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MATRIX_UP_TO = 100  # classes; a larger confusion matrix fills a result file that nobody reads
NO_CLASS = -1


@dataclass(frozen=True)
class PerClass:
    """classes: their names. truth, predicted: int64 (N,) class numbers; a prediction may be NO_CLASS."""

    classes: Sequence[str]
    truth: Tensor
    predicted: Tensor

    @property
    def images(self) -> Tensor:
        """(C,) how many samples each class has."""
        return self.truth.bincount(minlength=len(self.classes))

    @property
    def found(self) -> Tensor:
        """(C,) how many of them were predicted as such."""
        return self.truth[self.truth == self.predicted].bincount(minlength=len(self.classes))

    @property
    def claimed(self) -> Tensor:
        """(C,) how often each class was predicted, rightly or not."""
        return self.predicted[self.predicted != NO_CLASS].bincount(minlength=len(self.classes))

    def accuracies(self) -> list[float | None]:
        """Share of each class's samples that were found; None for a class without samples."""
        return [hits / total if total else None for hits, total in zip(self.found.tolist(), self.images.tolist())]

    def confusion(self) -> Tensor:
        """(C, C) counts, a row a true class, a column a predicted one; rows leave out samples with no class."""
        count, some = len(self.classes), self.predicted != NO_CLASS
        pairs = self.truth[some] * count + self.predicted[some]
        return pairs.bincount(minlength=count * count).view(count, count)

    def taken_for(self) -> list[int | None]:
        """Of each class, the other class that its samples were most often taken for, the lower number of equals."""
        wrong = (self.truth != self.predicted) & (self.predicted != NO_CLASS)
        count = len(self.classes)
        pairs, times = (self.truth[wrong] * count + self.predicted[wrong]).unique(return_counts=True)
        most: list[int | None] = [None] * count
        for pair in pairs[times.argsort(descending=True, stable=True)].tolist():
            if most[pair // count] is None:
                most[pair // count] = pair % count
        return most

    def best_and_worst(self, num: int = 5) -> tuple[list[int], list[int]]:
        """Class numbers, best first and worst first, the two ends of one order of the classes that have samples."""
        judged = [(-share, number) for number, share in enumerate(self.accuracies()) if share is not None]
        ranked = [number for _, number in sorted(judged)]
        return ranked[:num], ranked[::-1][:num]

    def details(self) -> dict[str, Any]:
        """For the result file: names, accuracies, and the confusion matrix of up to MATRIX_UP_TO classes."""
        details = {"classes": list(self.classes), "per_class_top1": self.accuracies()}
        return details | ({"confusion": self.confusion().tolist()} if len(self.classes) <= MATRIX_UP_TO else {})

    def write_csv(self, path: Path) -> None:
        """A line a class: number, name, images, found, top-1, how often predicted, what it is most often taken for."""
        columns = zip(
            self.classes, self.images.tolist(), self.found.tolist(), self.accuracies(), self.claimed.tolist(),
            self.taken_for(),
        )  # fmt: skip
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["class", "name", "images", "found", "top1", "predicted", "most_often_taken_for"])
            for number, (name, images, found, top1, claimed, other) in enumerate(columns):
                share = "" if top1 is None else f"{top1:.6f}"
                taken = "" if other is None else self.classes[other]
                rows.writerow([number, name, images, found, share, claimed, taken])


def predicted_class(scores: Tensor) -> Tensor:
    """The class in first place as `accuracy.place_of` counts: scores (..., C) -> int64 (...).

    Of equal scores the lower class number wins; a score that is not a number never does; without any other, NO_CLASS.
    """
    largest = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(-1, keepdim=True)
    first = scores == largest
    return first.int().argmax(-1).masked_fill(~first.any(-1), NO_CLASS)
