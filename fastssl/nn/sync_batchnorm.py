"""Batch norm over the joined batch of all ranks, on GPUs and, what torch's own SyncBatchNorm refuses, on CPUs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.modules import _functions
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import dist

M = TypeVar("M", bound=nn.Module)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d or 2d whose training statistics are those of all ranks' rows; ordinary when evaluating.

    Every rank must bring as many rows. On a GPU torch's fused function does the work. Not a subclass of torch's
    module, because DistributedDataParallel refuses that one on a CPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or dist.world() == 1:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        if x.is_cuda:
            return _functions.SyncBatchNorm.apply(
                x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum,
                td.group.WORLD, dist.world(),
            )  # fmt: skip
        shape = [1, -1, *[1] * (x.ndim - 2)]
        others = [0, *range(2, x.ndim)]
        wide = x.to(self.running_mean.dtype)
        mean = _MeanOverRanks.apply(wide.mean(others))
        centred = wide - mean.view(shape)
        variance = _MeanOverRanks.apply(centred.square().mean(others))
        rows = dist.world() * x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (rows / (rows - 1)), self.momentum)
        scale = (variance + self.eps).rsqrt()
        if self.affine:
            return (centred * (scale * self.weight).view(shape) + self.bias.view(shape)).to(x.dtype)
        return (centred * scale.view(shape)).to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        """Any shape (B, C, ...)."""


class _MeanOverRanks(torch.autograd.Function):
    """The mean over ranks is its own adjoint: each rank's x is 1/W of every rank's mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return dist.all_reduce_mean(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return dist.all_reduce_mean(gradient)


def sync_batchnorm_(module: M, key: str = "method.batch_norm") -> M:
    """Turn every BatchNorm1d and 2d inside `module` into a SyncBatchNorm, in place; parameters and names stay.

    key     the setting that asked for it, for messages
    Raises ValueError for another kind of batch norm (timm has some that include the activation).
    """
    for child in module.modules():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            child.__class__ = SyncBatchNorm
        elif isinstance(child, _BatchNorm) and not isinstance(child, SyncBatchNorm):
            raise ValueError(
                f"{key} is 'sync', but the encoder has a {type(child).__name__}, which cannot be; say plain"
            )
    return module
