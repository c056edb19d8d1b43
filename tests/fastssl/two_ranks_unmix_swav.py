"""Run by torchrun for test_unmix_swav.py: five float64 steps on rows r and B - 1 - r of each batch."""

import sys

import torch

from fastssl import dist
from tests.fastssl.test_swav import BATCH, train_steps
from tests.fastssl.test_unmix_swav import HALF, unmix, views


def five_steps(variant):
    method = unmix(variant, HALF, queue_length=2 * BATCH, queue_from="1steps")
    mine = [dist.rank(), BATCH - 1 - dist.rank()] if dist.world() == 2 else list(range(BATCH))

    def my_part(step):
        return {role: [crop[mine] for crop in crops] for role, crops in views(step).items()}

    train_steps(method, 5, my_part, dist.wrap_method(method))
    return {"model": method.state_dict(), "queue": method.queue}


if __name__ == "__main__":
    dist.setup("cpu")
    torch.save({v: five_steps(v) for v in ("reference", "corrected")}, f"{sys.argv[1]}/rank-{dist.rank()}.pt")
    dist.teardown()
