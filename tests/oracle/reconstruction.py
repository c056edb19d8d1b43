"""The masked reconstruction error and its gradient, and the squashing function, element by element."""

import numpy as np


def error(drawn, target, weight, empty_weight, per):
    """sum w (x - t)^2, divided by the number of elements or by sum w; w is 1, or `empty_weight` where weight is 0."""
    total, weights = 0.0, 0.0
    for x, t, m in zip(drawn.ravel(), target.ravel(), weight.ravel()):
        w = m + (1 - m) * empty_weight
        total += w * (x - t) * (x - t)
        weights += w
    return total / (drawn.size if per == "elements" else weights)


def error_gradient(drawn, target, weight, empty_weight, per):
    w = weight + (1 - weight) * empty_weight
    return 2 * w * (drawn - target) / (drawn.size if per == "elements" else w.sum())


def squash(v):
    length = np.sqrt((v**2).sum())
    return length**2 / (1 + length**2) * v / length
