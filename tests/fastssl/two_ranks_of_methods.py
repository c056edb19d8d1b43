"""Run by torchrun for test_two_ranks.py: five float64 steps of CLSA, Un-Mix and the decoder on this rank's halves.

Batch norm is in eval, as only then two halves can be the whole.
"""

import sys

import torch

from fastssl import dist
from tests.fastssl import test_clsa, test_moco, test_moco_decoder, test_unmix_moco

CLSA = {
    "clsa": {},
    "clsa_sym": {"symmetric": True, "enqueue": "both"},
    "clsa_sym_reference": {"symmetric": True, "variant": "reference", "key_exchange": "gather"},
    "clsa_plain_bn": {"batch_norm": "plain", "merge_equal_sizes": True},
}
DECODER = {"lr": 1e-3}  # its reconstruction has a weight of 50
UNMIX = {"unmix": {}, "unmix_sym": {"symmetric": True, "variant": "corrected"}}


def five_steps(method, views, lr=0.1):
    method.eval()
    model = dist.wrap_method(method)
    trainable = [p for p in method.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=lr, momentum=0.9, weight_decay=1e-4)
    for step in range(5):
        mine = {role: [v.chunk(dist.world())[dist.rank()] for v in parts] for role, parts in views(step).items()}
        method.before_step(step)
        output = model(mine, step)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step(output)
    return method.state_dict()


if __name__ == "__main__":
    dist.setup("cpu")
    states = {name: five_steps(test_clsa.clsa(**form), test_clsa.views) for name, form in CLSA.items()}
    states |= {name: five_steps(test_unmix_moco.unmix(**form), test_moco.views) for name, form in UNMIX.items()}
    states["decoder"] = five_steps(test_moco_decoder.build(), test_moco_decoder.views, **DECODER)
    torch.save(states, f"{sys.argv[1]}/rank-{dist.rank()}.pt")
    dist.teardown()
