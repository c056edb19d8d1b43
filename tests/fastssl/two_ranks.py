"""Run by torchrun for test_dist.py: five float64 MoCo steps on this rank's half of each batch, batch norm in eval."""

import sys

import torch

from fastssl import dist
from tests.fastssl.test_moco import moco, views
from tests.fastssl.two_ranks_of_methods import five_steps

if __name__ == "__main__":
    dist.setup("cpu")
    gathered = dist.all_gather(torch.tensor([[dist.rank(), 7 * dist.rank()]]))
    facts = {
        "gathered": gathered,
        "mean": dist.all_reduce_mean(torch.tensor([float(dist.rank())])),
        "any": torch.tensor([dist.any_rank(dist.rank() == 1), dist.any_rank(False)]),
        "said": torch.tensor(dist.main_says(5 if dist.rank() == 0 else None)),
    }
    states = {name: five_steps(moco(symmetric=name == "symmetric"), views) for name in ("plain", "symmetric")}
    torch.save({"facts": facts, **states}, f"{sys.argv[1]}/rank-{dist.rank()}.pt")
    dist.teardown()
