"""The online probe in NumPy, typed from the formulas: rows normalised, softmax cross-entropy, Adam (Kingma & Ba)."""

import numpy as np


def train(batches, num_classes, lr, beta1=0.9, beta2=0.999, eps_adam=1e-8, eps_norm=1e-5):
    """A layer from zeros on batches of features (B, F) and labels (B,): weight, bias, (top1, loss) before each step."""
    width = batches[0][0].shape[1]
    theta = np.zeros((num_classes, width + 1))
    m, v, told = np.zeros_like(theta), np.zeros_like(theta), []
    for t, (features, labels) in enumerate(batches, start=1):
        x = (features - features.mean(1, keepdims=True)) / np.sqrt(features.var(1, keepdims=True) + eps_norm)
        x = np.hstack([x, np.ones((len(x), 1))])
        z = x @ theta.T
        p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        told.append(((z.argmax(1) == labels).mean(), -np.log(p[np.arange(len(x)), labels]).mean()))
        g = (p - np.eye(num_classes)[labels]).T @ x / len(x)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        theta -= lr * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps_adam)
    return theta[:, :-1], theta[:, -1], told
