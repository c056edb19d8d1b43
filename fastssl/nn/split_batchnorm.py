"""Batch norm whose statistics come from parts of the batch: what several GPUs do to each other's keys, on one process.

MoCo needs the query and its key to be normalised by different companions, or batch statistics give the pair away
(He et al. 2020, section 3.3). With several ranks the key batch is shuffled among them; one process splits its batch.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

M = TypeVar("M", bound=nn.Module)


class SplitBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over `num_splits` contiguous groups of the batch when training, ordinary when evaluating.

    Every group updates its own copy of the running statistics, and the mean of the copies is kept, as in MoCo's CIFAR
    demo. There group j is samples j, j + S, ...; here it is the j-th contiguous part, which keeps channels-last
    memory: the same thing for a batch in random order. Raises ValueError if the batch does not divide.
    """

    num_splits: int = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.num_splits == 1:
            return super().forward(x)
        if x.shape[0] % self.num_splits:
            raise ValueError(
                f"method.split_groups is {self.num_splits}, but must divide the {x.shape[0]} images that pass the "
                f"encoder together; change it or run.batch_size"
            )
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        means = self.running_mean.repeat(self.num_splits, 1)
        variances = self.running_var.repeat(self.num_splits, 1)
        groups = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, self.momentum or 0.0, self.eps)
            for part, mean, variance in zip(x.chunk(self.num_splits), means, variances)
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        self.num_batches_tracked.add_(1)
        return torch.cat(groups)


def split_batchnorm_(module: M, num_splits: int) -> M:
    """Turn every BatchNorm2d inside `module` into a SplitBatchNorm2d, in place; parameters and names stay."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SplitBatchNorm2d
            child.num_splits = num_splits  # type: ignore[assignment]
    return module
