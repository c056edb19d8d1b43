"""Ways to choose images for labelling by their features alone. Everything is a pure function of arrays and a seed.

centers         k-means, then the image nearest to each centre, in rounds: one of each cluster, larger clusters first
edges           farthest points: each the one that is farthest from all chosen and all labelled ones (k-center greedy of
                Sener and Savarese, arXiv:1708.00489); without any of these the first is farthest from the mean
low_entropy     images that lie in one cluster most clearly; high_entropy: those between clusters
spectrum        the images in the order of their entropy, cut into equal parts, one drawn from each
random          by the seed alone: what any of the others has to beat
"""

# M candidates (images without a label yet), L labelled images, D feature width, K clusters
from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CHUNK = 1024
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Pool:
    """points (M, D) and their entropies (M,), the points that are labelled (L, D), and, where k-means ran, the cluster
    (M,) of each point and its distance (M,) to that cluster's centre."""

    points: Array
    labelled: Array
    seed: int
    cluster: Array
    distance: Array
    entropy: Array


@dataclass(frozen=True)
class Choice:
    """One chosen candidate; score is what its strategy ranks by: a distance or an entropy, nan for `random`."""

    row: int
    strategy: str
    score: float
    cluster: int


Strategy = Callable[[Pool, Array, int], tuple[Array, Array]]  # (pool, free (M,) bool, how many) -> rows, scores


def choose(pool: Pool, counts: dict[str, int]) -> list[Choice]:
    """Different candidates, as many as `counts` says, strategy after strategy."""
    free = np.ones(len(pool.points), bool)
    chosen: list[Choice] = []
    for name, num in counts.items():
        rows, scores = STRATEGIES[name](pool, free, num)
        free[rows] = False
        clusters = pool.cluster[rows] if len(pool.cluster) else [-1] * len(rows)
        chosen += [
            Choice(*entry) for entry in zip(map(int, rows), [name] * num, map(float, scores), map(int, clusters))
        ]
    return chosen


def centers(pool: Pool, free: Array, num: int) -> tuple[Array, Array]:
    rows = np.flatnonzero(free)
    rows = rows[np.lexsort((pool.distance[rows], pool.cluster[rows]))]
    of = pool.cluster[rows]
    starts = np.flatnonzero(np.diff(of, prepend=-1))
    round_of = np.arange(len(rows)) - np.repeat(starts, np.diff(starts, append=len(rows)))
    sizes = np.bincount(pool.cluster)
    rows = rows[np.lexsort((of, -sizes[of], round_of))][:num]
    return rows, pool.distance[rows]


def edges(pool: Pool, free: Array, num: int) -> tuple[Array, Array]:
    taken = np.concatenate([pool.labelled, pool.points[~free]])
    squares = np.einsum("md,md->m", pool.points, pool.points)
    # Where nothing is labelled or chosen the mean stands in, for the first point only.
    apart = nearest(pool.points, taken if len(taken) else pool.points.mean(0, dtype=np.float64)[None]) ** 2
    left = free.copy()
    rows, scores = np.zeros(num, np.int64), np.zeros(num)
    for i in range(num):
        row = rows[i] = np.where(left, apart, -np.inf).argmax()
        scores[i], left[row] = math.sqrt(apart[row]), False
        own = np.clip(squares + squares[row] - 2 * (pool.points @ pool.points[row]), 0, None)
        apart = own if i == 0 and not len(taken) else np.minimum(apart, own)
    return rows, scores


def low_entropy(pool: Pool, free: Array, num: int) -> tuple[Array, Array]:
    rows = np.flatnonzero(free)
    rows = rows[np.argsort(pool.entropy[rows], kind="stable")][:num]
    return rows, pool.entropy[rows]


def high_entropy(pool: Pool, free: Array, num: int) -> tuple[Array, Array]:
    rows = np.flatnonzero(free)
    rows = rows[np.argsort(-pool.entropy[rows], kind="stable")][:num]
    return rows, pool.entropy[rows]


def spectrum(pool: Pool, free: Array, num: int) -> tuple[Array, Array]:
    rows, _ = low_entropy(pool, free, int(free.sum()))
    parts, words = np.array_split(rows, num), np.random.Philox(key=pool.seed).random_raw(num)
    drawn = np.array([part[int(word) % len(part)] for part, word in zip(parts, words)], dtype=np.int64)
    return drawn, pool.entropy[drawn]


def random(pool: Pool, free: Array, num: int) -> tuple[Array, Array]:
    # Raw Philox words and a stable sort, because NumPy promises the same raw stream in every version.
    order = np.argsort(np.random.Philox(key=pool.seed).random_raw(len(free)), kind="stable")
    rows = order[free[order]][:num]
    return rows, np.full(num, np.nan)


STRATEGIES: dict[str, Strategy] = {
    "centers": centers,
    "edges": edges,
    "low_entropy": low_entropy,
    "high_entropy": high_entropy,
    "spectrum": spectrum,
    "random": random,
}


def split_budget(budget: int, shares: dict[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to the shares that add up to `budget`, by largest remainders; zeros left out."""
    exact = {name: budget * share / sum(shares.values()) for name, share in shares.items()}
    counts = {name: math.floor(number) for name, number in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: budget - sum(counts.values())]:
        counts[name] += 1
    return {name: count for name, count in counts.items() if count}


def k_means(points: Array, num_clusters: int, seed: int) -> Array:
    """The centres (K, D) of scikit-learn's k-means, from one k-means++ start.

    Raises ValueError if the points have fewer different places than clusters are asked for.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    model = KMeans(num_clusters, n_init=1, max_iter=100, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return model.fit(points).cluster_centers_
        except ConvergenceWarning:
            raise ValueError(
                f"evaluator.clusters is {num_clusters}, but the features have fewer different values; lower it, or look"
                " at them with evaluator=representation"
            ) from None


def assign(points: Array, centres: Array, temperature: float) -> tuple[Array, Array, Array]:
    """Of each point (M, D): its nearest centre, the distance to it, and the entropy in nats of softmax(-d^2 / scale).

    d are the distances to all centres. The scale is `temperature` times the mean of the smallest d^2, so that the
    entropies do not depend on the units of the features, nor on how far they are spread.
    """
    scale = temperature * max(float((nearest(points, centres) ** 2).mean()), 1e-30)  # each point may be its own centre
    found = []
    for start in range(0, len(points), CHUNK):
        squared = _squared_distances(points[start : start + CHUNK], centres)
        scaled = -squared / scale
        p = np.exp(scaled - scaled.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1)
        found.append((squared.argmin(1), np.sqrt(squared.min(1)), entropy))
    cluster, distance, entropies = (np.concatenate(part) for part in zip(*found))
    return cluster, distance, entropies


def nearest(points: Array, others: Array) -> Array:
    """float64 (M,): the distance of each point to the nearest of `others`."""
    parts = [_squared_distances(points[i : i + CHUNK], others).min(1) for i in range(0, len(points), CHUNK)]
    return np.sqrt(np.concatenate(parts))


def expected_classes(counts: Sequence[int], total: int, num: int) -> float:
    """How many classes a random choice of `num` out of `total` images holds on average; counts: images of each class.

    Exact: a class of n images is missed with probability C(total - n, num) / C(total, num).
    """

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    missed = [
        math.exp(log_choose(total - n, num) - log_choose(total, num)) if num <= total - n else 0.0 for n in counts
    ]
    return sum(1 - p for p in missed)


def _squared_distances(points: Array, others: Array) -> Array:
    a, b = points.astype(np.float64), others.astype(np.float64)
    return np.clip((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T, 0, None)
