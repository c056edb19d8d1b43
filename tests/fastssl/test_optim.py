"""The optimisers that fastssl builds, against torch's plain ones where a gradient comes late, and what is refused."""

import pytest
import torch
from torch import nn

from fastssl.optim import build_optimizer
from fastssl.settings import OptimConfig

CPU = torch.device("cpu")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def train(net, optimizer, late_from=2, steps=5):
    """The second layer's weight has no gradient before step `late_from`, as frozen prototypes have none."""
    for step in range(steps):
        optimizer.zero_grad()
        net(torch.full((2, 3), float(step + 1))).pow(2).sum().backward()
        if step < late_from:
            net[1].weight.grad = None
        optimizer.step()


@pytest.mark.parametrize("fused", ["torch", "off"])
def test_a_gradient_that_comes_late_moves_its_weight_as_plain_sgd_does(fused):
    ours, theirs = model(), model()
    settings = OptimConfig(lr=1e-3, momentum=0.9, weight_decay=0.01, fused=fused)
    train(ours, build_optimizer(ours, settings, CPU))
    train(theirs, torch.optim.SGD(theirs.parameters(), lr=1e-3, momentum=0.9, weight_decay=0.01, foreach=False))
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "lars", "adam"])
def test_a_weight_without_gradient_does_not_move(name):
    net = model()
    before = net[1].weight.clone()
    train(net, build_optimizer(net, OptimConfig(name=name, lr=1e-2, weight_decay=0.1), CPU), late_from=5)
    assert torch.equal(net[1].weight, before)


def test_adam_is_torchs():
    ours, theirs = model(), model()
    train(ours, build_optimizer(ours, OptimConfig(name="adam", lr=1e-3, weight_decay=0.0), CPU), late_from=0)
    train(theirs, torch.optim.Adam(theirs.parameters(), lr=1e-3, foreach=False), late_from=0)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_apex_is_for_sgd_only():
    with pytest.raises(ValueError, match=r"optim\.fused is 'apex'.*sgd only, not lars"):
        build_optimizer(model(), OptimConfig(name="lars", fused="apex"), CPU)
