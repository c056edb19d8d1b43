"""InfoNCE in NumPy, float64, typed from equation 1 of arXiv:1911.05722."""

import numpy as np


def info_nce(query, key, negatives, temperature):
    """Mean of -log( exp(q.k/T) / (exp(q.k/T) + sum_i exp(q.n_i/T)) ) over the rows."""
    losses = []
    for q, k in zip(query, key):
        positive = np.exp(np.dot(q, k) / temperature)
        others = sum(np.exp(np.dot(q, n) / temperature) for n in negatives)
        losses.append(-np.log(positive / (positive + others)))
    return np.mean(losses)


def info_nce_gradient(query, key, negatives, temperature):
    """d loss / d query: (1/B) sum_c (p_c - [c is positive]) x_c / T, with p the softmax over positive and negatives."""
    gradient = np.zeros_like(query)
    for i, (q, k) in enumerate(zip(query, key)):
        rows = np.vstack([k, negatives])
        logits = rows @ q / temperature
        p = np.exp(logits - logits.max())
        p /= p.sum()
        p[0] -= 1.0
        gradient[i] = p @ rows / temperature / len(query)
    return gradient
