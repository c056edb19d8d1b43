"""Run by torchrun for test_rejected_steps.py: rank 1 alone meets bad numbers, in a step of each method and in a run."""

import hashlib
import math
import sys

import torch

from fastssl import dist, train
from shard_tools.manifest import Manifest
from tests.fastssl import runs
from tests.fastssl.rejected import Lab, as_bytes, different, finite, pixel

HUGE = 1e25
TWO_RANKS = {
    "moco": ("moco", math.nan),
    "moco statistic": ("moco", HUGE),
    "moco gradient": ("moco", None),
    "moco_symmetric": ("moco_symmetric", math.inf),
    "clsa_multi": ("clsa_multi", math.nan),
    "unmix_moco": ("unmix_moco", math.nan),
    "moco_decoder": ("moco_decoder", math.nan),
    "autoencoder": ("autoencoder", math.nan),
    "swav": ("swav", math.nan),
    "swav_learning": ("swav_learning", math.inf),
    "unmix_swav": ("unmix_swav", math.nan),
}


def three_steps(form, value):
    """A good step, one with a bad number on rank 1, and a good one."""
    lab, rejected, own = Lab.build(form, steps=3), [], []
    guilty = dist.rank() == 1
    for step in range(3):
        before = lab.state()
        spoil, hook = (lambda views: None), None
        if step == 1 and guilty and value is not None:
            spoil = pixel(value)
        if step == 1 and guilty and value is None:
            *_, parameter = lab.training.method.backbone().parameters()
            hook = parameter.register_hook(lambda gradient: gradient * math.nan)
        lab.steps([step], spoil)
        if hook:
            hook.remove()
        if step == 1:
            changed = different(lab.state(), before)
        rejected.append(bool(lab.training.rejection.rejected))
        own.append(bool(lab.training.rejection.own))
    state = lab.state()
    digest = hashlib.sha256()
    for name, tensor in state.items():
        if "running_" not in name and (name != "method.queue" or "swav" not in form):  # these are a rank's own
            digest.update(as_bytes(tensor))
    told = {"rejected": rejected, "own": own}
    return {**told, "different": changed, "finite": finite(state), "shared": digest.hexdigest()}


def run_with_bad_batches(folder, shards):
    """fastssl-train, every batch of rank 1 spoilt from step 2 on. Returns its exit code and this rank's samples."""
    names, real, manifest = [], train.to_device, Manifest.load(shards)

    def spoilt(batch, cfg, device):
        views = real(batch, cfg, device)
        if batch.step >= 2:
            names.extend(manifest.member_name(i) for i in batch.ids.tolist())
            if dist.rank() == 1:
                pixel(math.nan)(views)
        return views

    train.to_device = spoilt
    code = train.main(runs.settings(shards, f"{folder}/run", "run.max_rejected=3", "run.save_every=never"))
    return {"exit_code": code, "names": names}


if __name__ == "__main__":
    dist.setup("cpu")
    rank = dist.rank()
    facts = {name: three_steps(*case) for name, case in TWO_RANKS.items()}
    facts |= run_with_bad_batches(*sys.argv[1:])
    torch.save(facts, f"{sys.argv[1]}/rank-{rank}.pt")
