"""Run by torchrun for test_online.py: the probe on this rank's half of each batch."""

import sys

import torch

from fastssl import dist
from tests.fastssl.evaluate.test_online import probed

if __name__ == "__main__":
    dist.setup("cpu")
    torch.save(probed(dist.rank(), dist.world()), f"{sys.argv[1]}/rank-{dist.rank()}.pt")
    dist.teardown()
