"""Run by torchrun for test_swav.py: five float64 SwAV steps on this rank's half of each batch, and their parts."""

import sys

import numpy as np
import torch

from fastssl import dist
from fastssl.losses import sinkhorn
from fastssl.nn.sync_batchnorm import sync_batchnorm_
from tests.fastssl import test_moco
from tests.fastssl.test_swav import swav, train_steps, views

SETTINGS = {
    "eval": {"batch_norm": "plain"},
    "sync": {"batch_norm": "sync"},
    "queue": {"batch_norm": "sync", "queue_length": 8, "queue_from": "1steps"},
}


def my_part(views):
    return {role: [v.chunk(dist.world())[dist.rank()] for v in parts] for role, parts in views.items()}


def five_steps(kind):
    method = swav(freeze_prototypes="2steps", **SETTINGS[kind]).train(kind != "eval")
    train_steps(method, 5, lambda step: my_part(views(step)), dist.wrap_method(method))
    return {"model": method.state_dict(), "queue": method.queue}


def moco_steps():
    method = test_moco.moco(batch_norm="sync")
    model = dist.wrap_method(method)
    optimizer = torch.optim.SGD(method.encoder_q.parameters(), lr=0.1, momentum=0.9)
    for step in range(5):
        method.before_step(step)
        output = model(my_part(test_moco.views(step)), step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(output)
    return method.state_dict()


def batch_norm_facts(norm, shape):
    """What `norm` makes of this rank's part of a batch of `shape`, and the gradients of a loss that differs by row."""
    generator = torch.Generator().manual_seed(1)
    everything, weight = torch.randn(2, *shape, generator=generator, dtype=torch.float64) + 5.0
    x, w = (part.chunk(dist.world())[dist.rank()].clone() for part in (everything, weight))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, -1.0]))
        norm.bias.copy_(torch.tensor([0.0, 3.0, 1.0]))
    x.requires_grad_()
    output = norm(x)
    (output.square() * w).sum().backward()
    return {
        "output": output.detach(),
        "gradient": x.grad,
        "weight": norm.weight.grad,
        "bias": norm.bias.grad,
        "evaluated": norm.eval()(everything).detach(),
        **dict(norm.named_buffers()),
    }


if __name__ == "__main__":
    dist.setup("cpu")
    scores = torch.from_numpy(np.random.default_rng(5).uniform(-1, 1, (2, 6, 5)))
    facts = {kind: five_steps(kind) for kind in SETTINGS}
    facts["codes"] = sinkhorn(scores[dist.rank()], 0.05, 3)
    facts["moco"] = moco_steps()
    facts["batch_norm_2"] = batch_norm_facts(sync_batchnorm_(torch.nn.BatchNorm1d(3).double()), (6, 3))
    facts["batch_norm_4"] = batch_norm_facts(sync_batchnorm_(torch.nn.BatchNorm2d(3).double()), (6, 3, 4, 2))
    torch.save(facts, f"{sys.argv[1]}/rank-{dist.rank()}.pt")
    dist.teardown()
