"""Un-Mix in NumPy, float64: the box of CutMix (arXiv:1905.04899, appendix) and the objective of arXiv:2003.05438."""

import numpy as np

from tests.oracle import contrast


def box(side, lam, row, column):
    """Boolean (side, side): the pixels within cut // 2 of a centre, cut = floor(side sqrt(1 - lam))."""
    half = int(np.floor(side * np.sqrt(1 - lam))) // 2
    i, j = np.mgrid[:side, :side]
    return (row - half <= i) & (i < row + half) & (column - half <= j) & (j < column + half)


def mix(images, blend, lam, row, column):
    """Each image with its partner from the other end of the batch, one pair at a time: mixed images and lambda."""
    batch, _, side, _ = images.shape
    weight = np.full((side, side), lam) if blend else 1.0 - box(side, lam, row, column)
    mixed = np.stack([weight * images[i] + (1 - weight) * images[batch - 1 - i] for i in range(batch)])
    return mixed, lam if blend else weight.mean()


def objective(query, mixture_query, key, negatives, lam, temperature):
    """L(q, k) + lam L(m, k) + (1 - lam) L(reversed m, k), all against the same keys and negatives."""
    return (
        contrast.info_nce(query, key, negatives, temperature)
        + lam * contrast.info_nce(mixture_query, key, negatives, temperature)
        + (1 - lam) * contrast.info_nce(mixture_query[::-1], key, negatives, temperature)
    )


def objective_gradients(query, mixture_query, key, negatives, lam, temperature):
    """With respect to the queries and to the queries of the mixtures."""
    forth = contrast.info_nce_gradient(mixture_query, key, negatives, temperature)
    back = contrast.info_nce_gradient(mixture_query[::-1], key, negatives, temperature)[::-1]
    return contrast.info_nce_gradient(query, key, negatives, temperature), lam * forth + (1 - lam) * back
