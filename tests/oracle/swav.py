"""SwAV in NumPy, float64: Sinkhorn and the loss typed from arXiv:2006.09882, LARC from arXiv:1708.03888."""

import numpy as np


def sinkhorn(scores_of_ranks, epsilon, iterations):
    """Codes of each rank's rows. Q is (prototypes, rows); the ranks' rows stand side by side in it."""
    q = np.exp(np.concatenate(scores_of_ranks) / epsilon).T
    prototypes, rows = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdims=True) / prototypes
        q = q / q.sum(0, keepdims=True) / rows
    return np.split((q * rows).T, np.cumsum([len(s) for s in scores_of_ranks])[:-1])


def loss(scores, codes, temperature):
    """scores: a (B, P) a view; codes: one (B, P) for each of the first views."""
    total = 0.0
    for i, q in enumerate(codes):
        others = [v for v in range(len(scores)) if v != i]
        for v in others:
            for row, code in zip(scores[v], q):
                p = np.exp(row / temperature) / np.exp(row / temperature).sum()
                total -= (code * np.log(p)).sum() / len(q) / len(others) / len(codes)
    return total


def loss_gradient(scores, codes, temperature):
    """d loss / d scores: each view's softmax minus the code, summed over the codes it predicts."""
    gradient = np.zeros_like(scores)
    for i, q in enumerate(codes):
        for v in range(len(scores)):
            if v != i:
                p = np.exp(scores[v] / temperature)
                p /= p.sum(1, keepdims=True)
                gradient[v] += (p - q) / temperature / len(q) / (len(scores) - 1) / len(codes)
    return gradient


def larc(parameter, gradient, velocity, lr, momentum, weight_decay, trust, eps=1e-8):
    """One step of SGD under LARC: the new parameter and velocity (None at the first step)."""
    w, g = np.linalg.norm(parameter), np.linalg.norm(gradient)
    if w > 0 and g > 0:
        gradient = (gradient + weight_decay * parameter) * trust * w / (g + weight_decay * w + eps)
    velocity = gradient if velocity is None else momentum * velocity + gradient
    return parameter - lr * velocity, velocity
