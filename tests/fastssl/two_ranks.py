"""Run by torchrun for test_dist.py: five float64 MoCo steps on this rank's half of each batch, batch norm in eval."""

import sys

import torch

from fastssl import dist
from tests.fastssl.test_moco import moco, views


def five_steps(**moco_settings):
    method = moco(**moco_settings).eval()
    model = dist.wrap(method)
    optimizer = torch.optim.SGD(method.encoder_q.parameters(), lr=0.1, momentum=0.9)
    for step in range(5):
        mine = {role: [v.chunk(dist.world())[dist.rank()] for v in parts] for role, parts in views(step).items()}
        method.before_step(step)
        output = model(mine, step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(output)
    return method


if __name__ == "__main__":
    dist.setup("cpu")
    gathered = dist.all_gather(torch.tensor([[dist.rank(), 7 * dist.rank()]]))
    facts = {
        "gathered": gathered,
        "mean": dist.all_reduce_mean(torch.tensor([float(dist.rank())])),
        "any": torch.tensor([dist.any_rank(dist.rank() == 1), dist.any_rank(False)]),
        "said": torch.tensor(dist.main_says(5 if dist.rank() == 0 else None)),
    }
    states = {name: five_steps(symmetric=name == "symmetric").state_dict() for name in ("plain", "symmetric")}
    torch.save({"facts": facts, **states}, f"{sys.argv[1]}/rank-{dist.rank()}.pt")
    dist.teardown()
