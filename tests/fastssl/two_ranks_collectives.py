"""Run by torchrun for test_collectives.py: what one step of each method sends, the dealt keys, and late answers."""

import json
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl import config, dist
from fastssl.nn.sync_batchnorm import SyncBatchNorm
from fastssl.schedule import Clock
from fastssl.training import Training, to_device
from pipelines.synthetic import SyntheticLoader
from tests.fastssl.test_host_waits import BATCH, FORMS, SMALL
from tests.fastssl.test_moco import moco

MORE_FORMS = {
    "moco_gather": [*FORMS["moco"], "method.key_exchange=gather"],
    "moco_plain": [*FORMS["moco"], "method.batch_norm=plain"],
    "moco_split": [*FORMS["moco"], "method.batch_norm=split"],
    "unmix_swav_corrected": [*FORMS["unmix_swav"], "method.variant=corrected"],
}


class Collectives(TorchDispatchMode):
    """(name, bytes of the largest tensor) of every collective, those of DDP's reducer included, in order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, kinds, args=(), kwargs=None):
        if operator.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.seen.append((operator.overloadpacket.__name__, max(t.nbytes for t in tensors)))
        return operator(*args, **(kwargs or {}))


def collectives_of_a_step(form):
    """Of the fourth step: the first two sort DDP's buckets."""
    cfg = config.load([*SMALL, *{**FORMS, **MORE_FORMS}[form]])
    trained = Training.build(cfg, torch.device("cpu"), Clock(100, BATCH))
    loader = SyntheticLoader(
        cfg.view_specs(), batch_size=BATCH, rank=dist.rank(), world=dist.world(), channels=cfg.encoder.channels,
        output="float32",
    )  # fmt: skip
    for step, batch in zip(range(4), loader.batches()):
        with Collectives() as collectives:
            trained.step(to_device(batch, cfg, trained.device), step, 0.01)
    (trunk, *_), head = trained.method.encoders(), getattr(trained.method, "projection_head", torch.nn.Identity())
    norms = [m for part in (trunk, trunk, head) for m in part.modules() if isinstance(m, SyncBatchNorm)]
    return {
        "seen": collectives.seen,
        "gradient_bytes": sum(p.nbytes for p in trained.method.parameters() if p.requires_grad),
        "batch_norms": [2 * norm.running_mean.nbytes for norm in norms],  # the trunk's in both resolutions
    }


def dealt_and_gathered():
    """Keys of all ranks in train mode by either exchange in the same order, that order, and every rank's own view."""
    view = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(dist.rank()))
    view = view.contiguous(memory_format=torch.channels_last)
    deal = moco().train()
    order = deal.shuffle(len(view), 7, view.device)
    gather = moco(key_exchange="gather").train()
    gather.shuffle = lambda *_: order
    facts = {"deal": deal.keys(view, 7), "gather": gather.keys(view, 7), "order": order, "view": view}
    facts["odd"] = moco().train().keys(view[:3], 7)  # two ranks do not divide three images: gathered
    return facts


if __name__ == "__main__":
    dist.setup("cpu")
    steps = {form: collectives_of_a_step(form) for form in [*FORMS, *MORE_FORMS]}
    lately = dist.LargestLately()
    answers = [lately(flag) for flag in (False, dist.rank() == 1, False, False)]
    norm = torch.nn.BatchNorm1d(2)
    norm.running_mean.fill_(dist.rank() + 5.0)
    norm.running_var.fill_(dist.rank() + 5.0)
    dist.follow_main_(norm, own=("running_var",))
    facts = {**dealt_and_gathered(), "followed": torch.stack([norm.running_mean, norm.running_var])}
    torch.save({**facts, "answers": torch.tensor(answers)}, f"{sys.argv[1]}/rank-{dist.rank()}.pt")
    with open(f"{sys.argv[1]}/steps-{dist.rank()}.json", "w") as file:
        json.dump(steps, file)
    dist.teardown()
