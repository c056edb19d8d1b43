"""Weighted kNN in NumPy, typed from the formulas: cosine similarity, the k nearest, a vote e^(similarity / t) each."""

import numpy as np


def class_scores(queries, bank, labels, k, temperature, num_classes):
    """(Q, F), (N, F), (N,) -> (Q, C)"""
    q = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    b = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    scores = np.zeros((len(q), num_classes))
    for i in range(len(q)):
        similarity = b @ q[i]
        for j in np.argsort(-similarity, kind="stable")[:k]:
            scores[i, labels[j]] += np.exp(similarity[j] / temperature)
    return scores


def accuracy(scores, truth, top):
    """Share of rows whose true class is among the `top` best classes that have a vote at all."""
    hits = 0
    for row, true_class in zip(scores, truth):
        best = np.argsort(-row, kind="stable")[:top]
        hits += any(c == true_class and row[c] > 0 for c in best)
    return hits / len(truth)
