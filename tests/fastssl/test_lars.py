"""Lars, as `build_optimizer` sets it up, held to the numbers of LARC with clip=False: what SwAV trains with."""

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.optim import build_optimizer
from fastssl.settings import OptimConfig
from tests.oracle import swav as oracle

CPU = torch.device("cpu")


def module(*parameters):
    return nn.ParameterList([nn.Parameter(torch.as_tensor(p, dtype=torch.float64)) for p in parameters])


def lars(parameters, fused="torch", **settings):
    settings = {
        "name": "lars",
        "lr": 4.8,
        "momentum": 0.9,
        "weight_decay": 1e-6,
        "trust": 1e-3,
        "fused": fused,
        **settings,
    }
    return build_optimizer(parameters, OptimConfig(**settings), CPU)


@pytest.mark.parametrize("fused", ["torch", "off"])
def test_the_first_step_has_the_published_factor(fused):
    parameters = module([3.0, 4.0])
    parameters[0].grad = torch.tensor([0.6, 0.8], dtype=torch.float64)
    before = parameters[0].detach().clone()
    lars(parameters, fused).step()
    step = before - parameters[0].detach()
    np.testing.assert_allclose(step, [0.0144000016, 0.0192000028], atol=5e-9)  # those were float32
    factor = step / 4.8 / (torch.tensor([0.6, 0.8]) + 1e-6 * before)
    np.testing.assert_allclose(factor, [0.004999975] * 2, atol=5e-10)


@pytest.mark.parametrize("fused", ["torch", "off"])
def test_a_tensor_of_zeros_takes_one_step_of_its_raw_gradient(fused):
    parameters = module([0.0, 0.0])
    parameters[0].grad = torch.tensor([0.5, -2.0], dtype=torch.float64)
    lars(parameters, fused, lr=0.6).step()
    np.testing.assert_allclose(parameters[0].detach(), [-0.3, 1.2])


@pytest.mark.parametrize("fused", ["torch", "off"])
@pytest.mark.parametrize("weight_decay", [0.0, 1e-6, 0.1])
def test_several_steps_equal_larc_and_sgd_with_momentum(fused, weight_decay, rng):
    """A matrix, a bias that starts at zero and a tensor without a gradient at first (a frozen one)."""
    values = [rng.standard_normal((4, 3)), np.zeros(5), rng.standard_normal((2, 2))]
    parameters = module(*values)
    optimizer = lars(parameters, fused, weight_decay=weight_decay)
    velocities = [None] * 3
    for step in range(6):
        for i, p in enumerate(parameters):
            gradient = rng.standard_normal(values[i].shape)
            p.grad = None if i == 2 and step < 3 else torch.from_numpy(gradient)
            if p.grad is not None:
                values[i], velocities[i] = oracle.larc(
                    values[i], gradient, velocities[i], 0.1 * step, 0.9, weight_decay, 1e-3
                )
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * step
        optimizer.step()
    for p, expected in zip(parameters, values):
        np.testing.assert_allclose(p.detach(), expected, rtol=0, atol=1e-13)


def test_a_gradient_of_zeros_leaves_the_weights_undecayed_as_larc_does():
    parameters = module([3.0, 4.0])
    parameters[0].grad = torch.zeros(2, dtype=torch.float64)
    lars(parameters, lr=0.6).step()
    assert parameters[0].tolist() == [3.0, 4.0]


def test_the_decay_of_a_group_outlives_the_step():
    parameters = module([3.0, 4.0])
    optimizer = lars(parameters, weight_decay=0.25)
    parameters[0].grad = torch.ones(2, dtype=torch.float64)
    optimizer.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25]


@pytest.mark.parametrize("overflow", [False, True])
def test_under_a_scaler_a_step_is_the_same_or_does_not_happen(overflow, rng):
    """float16's GradScaler hands over its scale and whether a gradient overflowed; the momentum waits as well."""
    value, gradients = rng.standard_normal((3, 3)).astype(np.float32), rng.standard_normal((2, 3, 3))
    ends = []
    for enabled in (False, True):
        parameters = nn.ParameterList([nn.Parameter(torch.from_numpy(value.copy()))])
        optimizer, scaler = lars(parameters), torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=enabled)
        for i, gradient in enumerate(gradients):
            scaler.scale((parameters[0] * torch.from_numpy(gradient).float()).sum()).backward()
            if overflow and i == 1:
                if not enabled:
                    break
                parameters[0].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append((parameters[0].detach(), optimizer.state[parameters[0]]["momentum_buffer"]))
    for plain, scaled in zip(*ends):
        torch.testing.assert_close(plain, scaled, rtol=1e-6, atol=1e-8)


def test_without_weight_decay_a_step_does_not_feel_the_gradients_scale(rng):
    gradient, ends = torch.from_numpy(rng.standard_normal((3, 3))), []
    for scale in (1.0, 1000.0):
        parameters = module(np.eye(3))
        parameters[0].grad = scale * gradient
        lars(parameters, weight_decay=0.0).step()
        ends.append(parameters[0].detach())
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-7)  # eps 1e-8 beside a norm of about 3


def test_weights_only_spares_biases_and_norms_decay_and_rescaling():
    parameters = module(np.eye(2), [3.0, 4.0])
    for p in parameters:
        p.grad = torch.ones_like(p)
    lars(parameters, lr=0.5, weight_decay_on="weights").step()
    np.testing.assert_allclose(parameters[1].detach(), [2.5, 3.5])
    assert 1 - parameters[0][0, 0].item() < 1e-3
