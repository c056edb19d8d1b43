"""The measures of a representation in NumPy, typed from the papers' formulas."""

import numpy as np


def rank_me(features):
    """Garrido et al. 2022, eq. 1 and 2."""
    sigma = np.linalg.svd(features, compute_uv=False)
    p = sigma / np.abs(sigma).sum() + 1e-7
    return np.exp(-np.sum(p * np.log(p)))


def participation_ratio(features):
    eigenvalues = np.linalg.eigvalsh(np.cov(features, rowvar=False, bias=True))
    return eigenvalues.sum() ** 2 / (eigenvalues**2).sum()


def alignment(x, y):
    """Wang and Isola 2020, section 4.1.1, alpha = 2."""
    return np.mean([np.linalg.norm(a - b) ** 2 for a, b in zip(x, y)])


def uniformity(x, t=2):
    """Wang and Isola 2020, section 4.1.2, over pairs of different points."""
    terms = [np.exp(-t * np.linalg.norm(x[i] - x[j]) ** 2) for i in range(len(x)) for j in range(i)]
    return np.log(np.mean(terms))
