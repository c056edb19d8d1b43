"""Similarity placement as its definition reads: one list of distances for each image."""

import numpy as np


def placements(codes, mirrored, metric):
    def distance(a, b):
        if metric == "l1":
            return np.abs(a - b).sum()
        if metric == "l2":
            return np.sqrt(((a - b) ** 2).sum())
        return 1 - (a @ b) / np.sqrt(a @ a) / np.sqrt(b @ b)

    found = []
    for i in range(len(codes)):
        own = distance(codes[i], mirrored[i])
        ordered = sorted([distance(codes[i], other) for other in codes] + [own])
        found.append(ordered.index(own))
    return found
