"""InfoNCE against its NumPy statement, value and gradient."""

import numpy as np
import pytest
import torch

from fastssl.losses import info_nce
from tests.oracle import contrast


def unit(rng, *shape):
    x = rng.standard_normal(shape)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize(("batch", "queue", "temperature"), [(1, 1, 0.07), (8, 64, 0.2), (5, 7, 1.0)])
def test_info_nce_and_its_gradient_match_equation_1(batch, queue, temperature):
    rng = np.random.default_rng(batch)
    q, k, n = unit(rng, batch, 16), unit(rng, batch, 16), unit(rng, queue, 16)
    query = torch.from_numpy(q).requires_grad_()
    loss, _ = info_nce(query, torch.from_numpy(k), torch.from_numpy(n), temperature)
    loss.backward()
    np.testing.assert_allclose(loss.item(), contrast.info_nce(q, k, n, temperature), rtol=1e-12)
    np.testing.assert_allclose(query.grad.numpy(), contrast.info_nce_gradient(q, k, n, temperature), atol=1e-12)


@pytest.mark.parametrize(("temperature", "expected"), [(0.07, 0.348734), (0.2, 0.446996)])
def test_info_nce_has_the_value_that_the_published_code_gives(temperature, expected):
    nrm = torch.nn.functional.normalize
    q, k = nrm(torch.tensor([[1.0, 2], [3, -1]])), nrm(torch.tensor([[1.0, 1], [2, 0]]))
    queue = nrm(torch.tensor([[1.0, 0, -1], [1, -1, 2]]), dim=0)  # published layout: a column a key
    loss, _ = info_nce(q, k, queue.T, temperature)
    assert loss.item() == pytest.approx(expected, abs=2e-6)


def test_info_nce_stays_finite_and_float32_under_half_precision():
    q = torch.nn.functional.normalize(torch.ones(4, 8)).half()
    loss, logs = info_nce(q, q, -q, 0.001)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert logs["contrast_top1"].item() == 1.0


def test_accuracy_counts_queries_whose_positive_beats_every_negative():
    q = torch.eye(2)
    k = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    _, logs = info_nce(q, k, torch.tensor([[0.0, 0.7]]), 1.0)
    assert logs["contrast_top1"].item() == 0.5
