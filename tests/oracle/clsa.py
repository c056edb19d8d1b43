"""CLSA's two losses in NumPy, float64, typed from arXiv:2104.07713 and one pair of views at a time."""

import numpy as np


def softmax(logits):
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def contrast(query, candidates, place, temperature):
    """Mean of -log( exp(q.n_own / T) / sum over all candidates exp(q.n / T) ); row i's own is candidate place + i."""
    p = softmax(query @ candidates.T / temperature)
    return -np.mean([np.log(row[place + i]) for i, row in enumerate(p)])


def ddm(weak, strong, candidates, temperature):
    """Mean over rows of the cross-entropy of the strong view's distribution under the weak view's."""
    p, q = (softmax(x @ candidates.T / temperature) for x in (weak, strong))
    return -np.mean((p * np.log(q)).sum(1))


def loss(weak, strong, candidates, place, temperature, strong_temperature):
    """The sums over weak views and over pairs."""
    return (
        sum(contrast(q, candidates, place, temperature) for q in weak),
        sum(ddm(q, s, candidates, strong_temperature) for q in weak for s in strong),
    )


def gradients(weak, strong, candidates, place, temperature, strong_temperature):
    """d contrast / d weak and d ddm / d strong; the targets of DDM are constants, so it gives weak views none."""
    to_weak, to_strong = [], []
    for q in weak:
        p = softmax(q @ candidates.T / temperature)
        p[np.arange(len(q)), place + np.arange(len(q))] -= 1.0
        to_weak.append(p @ candidates / temperature / len(q))
    for s in strong:
        mine = softmax(s @ candidates.T / strong_temperature)
        apart = sum(mine - softmax(q @ candidates.T / strong_temperature) for q in weak)
        to_strong.append(apart @ candidates / strong_temperature / len(s))
    return to_weak, to_strong
