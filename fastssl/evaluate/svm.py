"""Linear SVMs for several labels an image, one a class, with the protocol of the published VOC07 numbers.

Goyal et al., arXiv:1905.01235, and VISSL: features of unit length, LinearSVC (squared hinge, L2, dual, at most 2000
iterations), positives weighted twice, the cost of each class by 3-fold cross-validated average precision.
Nothing here needs torch: a class is fitted in a process of its own, because liblinear has one generator of random
numbers a process, so that threads would make the result depend on their timing.
"""

# N images, F features, C classes, V costs
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastssl.evaluate.average_precision import average_precision

Floats = npt.NDArray[np.float64]

COSTS = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)


@dataclass(frozen=True)
class SvmProtocol:
    """costs: candidates. positive_weight: of the positives' errors; negatives weigh 1.

    difficult   how training treats images that show a class only as difficult objects: as "negative", which is what the
                published code does, or "ignored". The test always ignores them
    """

    costs: tuple[float, ...] = COSTS
    folds: int = 3
    max_iter: int = 2000
    positive_weight: float = 2.0
    difficult: str = "negative"
    seed: int = 0


@dataclass(frozen=True)
class Fitted:
    """One class: scores of the test images (N,), its cost, cross-validated AP of every cost, fits cut off."""

    scores: Floats
    cost: float
    held_out: Floats
    num_unconverged: int


def unit_length(features: npt.ArrayLike) -> Floats:
    """(N, F) divided by the rows' norm + 1e-5, as VISSL does."""
    x = np.asarray(features, np.float64)
    return x / (np.linalg.norm(x, axis=1, keepdims=True) + 1e-5)


def targets(labels: npt.NDArray[np.int8], protocol: SvmProtocol) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
    """(rows to train on, their targets 1 or -1) of one class's labels (N,)."""
    rows = np.arange(len(labels)) if protocol.difficult == "negative" else np.flatnonzero(labels != -1)
    return rows, np.where(labels[rows] == 1, 1, -1)


def fit_class(train: Floats, labels: npt.NDArray[np.int8], test: Floats, protocol: SvmProtocol) -> Fitted:
    """Choose the cost by cross-validation on `train` (N, F), fit on all of it, score `test`; of equals the first."""
    rows, y = targets(labels, protocol)
    x = train[rows]
    held_out, unconverged = np.zeros(len(protocol.costs)), 0
    for number, cost in enumerate(protocol.costs):
        held_out[number], cut = _counting_unconverged(_cross_validated, cost, x, y, protocol)
        unconverged += cut
    best = protocol.costs[int(held_out.argmax())]
    model, cut = _counting_unconverged(svm(best, protocol).fit, x, y)
    return Fitted(model.decision_function(test), best, held_out, unconverged + cut)


def low_shot_aps(
    train: Floats,
    labels: npt.NDArray[np.int8],
    test: Floats,
    test_labels: npt.NDArray[np.int8],
    draws: Sequence[npt.NDArray[np.intp]],
    protocol: SvmProtocol,
) -> tuple[Floats, int]:
    """(area AP on the test (draws, V), fits cut off) of one class trained on each of `draws`, rows of `train`."""
    aps, unconverged = np.zeros((len(draws), len(protocol.costs))), 0
    for d, rows in enumerate(draws):
        y = np.where(labels[rows] == 1, 1, -1)
        for v, cost in enumerate(protocol.costs):
            model, cut = _counting_unconverged(
                lambda rows=rows, y=y, cost=cost: svm(cost, protocol).fit(train[rows], y)
            )
            aps[d, v] = average_precision(model.decision_function(test), test_labels).area
            unconverged += cut
    return aps, unconverged


def low_shot_rows(
    labels: npt.NDArray[np.int8], k: int, num_classes: int, key: tuple[int, int, int]
) -> npt.NDArray[np.intp]:
    """k positives and k negatives for each other class, drawn from one class's labels (N,), sorted by row.

    key (seed, draw, class): the draw is a function of it and of k. Raises ValueError if there are too few.
    """
    seed, draw, number = key
    chosen = []
    for value, wanted in ((1, k), (0, (num_classes - 1) * k)):
        rows = np.flatnonzero(labels == value)
        if len(rows) < wanted:
            what = "show it" if value else "do not"
            raise ValueError(f"only {len(rows)} training images {what}, but k = {k} needs {wanted}")
        words = np.random.Philox(key=[seed, ((draw * 10_000 + k) * 10_000 + number) * 2 + value]).random_raw(len(rows))
        chosen.append(rows[np.argsort(words, kind="stable")[:wanted]])
    return np.sort(np.concatenate(chosen))


def svm(cost: float, protocol: SvmProtocol) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(
        C=cost, class_weight={1: protocol.positive_weight, -1: 1.0}, penalty="l2", loss="squared_hinge", dual=True,
        tol=1e-4, intercept_scaling=1.0, max_iter=protocol.max_iter, random_state=protocol.seed,
    )  # fmt: skip


def in_processes(work: Callable[..., Any], tasks: Iterable[tuple[Any, ...]], jobs: int) -> list[Any]:
    """work(*task) of every task, in order, in at most `jobs` processes. Raises ValueError without scikit-learn."""
    try:
        import sklearn  # noqa: F401
        from joblib import Parallel, delayed
    except ModuleNotFoundError as error:
        raise ValueError("linear SVMs need scikit-learn; install fastssl-train[eval]") from error
    return Parallel(n_jobs=jobs)(delayed(work)(*task) for task in tasks)


def _cross_validated(cost: float, x: Floats, y: npt.NDArray[np.int64], protocol: SvmProtocol) -> float:
    from sklearn.model_selection import cross_val_score

    return cross_val_score(svm(cost, protocol), x, y, cv=protocol.folds, scoring="average_precision").mean()


def _counting_unconverged(fit: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """(what `fit` returns, how many of its fits stopped at max_iter); other warnings are passed on."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit(*arguments)
    cut = [w for w in caught if issubclass(w.category, ConvergenceWarning)]
    for other in caught:
        if other not in cut:
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    return result, len(cut)
