"""Batch norm over the joined batch of all ranks, on GPUs and, what torch's own SyncBatchNorm refuses, on CPUs."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import dist

M = TypeVar("M", bound=nn.Module)


class SyncBatchNorm(_BatchNorm):
    """BatchNorm1d or 2d whose training statistics are those of all ranks' rows; ordinary when evaluating.

    Every rank must bring as many rows. torch's own module lets ranks bring different numbers and therefore masks the
    gathered statistics, for which the host waits for the GPU at every layer (pytorch issue 78656, torch 2.14); and
    DistributedDataParallel refuses it on a CPU. Two collectives of 2 C numbers: one forward, one backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or dist.world() == 1:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        weight = self.weight if self.affine else torch.ones_like(self.running_mean)
        bias = self.bias if self.affine else torch.zeros_like(self.running_mean)
        y, mean, variance = _Normalize.apply(x, weight, bias, self.eps)
        rows = dist.world() * x.numel() // x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (rows / (rows - 1)), self.momentum)
        return y

    def _check_input_dim(self, x: Tensor) -> None:
        """Any shape (B, C, ...)."""


class _Normalize(torch.autograd.Function):
    """x (B, C, ...) by the mean and the variance of all ranks' rows, and these two (C,)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        means, variances = dist.all_gather(torch.stack(_statistics(x, eps))[None]).unbind(1)
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, variance = ctx.saved_tensors
        if not dy.is_contiguous(memory_format=torch.channels_last):
            dy = dy.contiguous()
        inverse_std = (variance + ctx.eps).rsqrt()
        sum_dy, sum_dy_centred = _gradient_sums(dy, x, weight, mean, variance, ctx.eps)
        all_dy, all_dy_centred = dist.all_reduce_sum(torch.stack([sum_dy, sum_dy_centred])).unbind()
        rows = dist.world() * x.numel() // x.shape[1]
        dx = _input_gradient(dy, x, weight, mean, inverse_std, all_dy, all_dy_centred, rows)
        return dx, (sum_dy_centred * inverse_std).to(weight.dtype), sum_dy.to(weight.dtype), None


# The three passes over images. On a GPU they are the kernels of torch's own synchronised batch norm.


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of this rank's rows, in at least float32."""
    if x.is_cuda:
        mean, inverse_std = torch.batch_norm_stats(x, eps)
        return mean, inverse_std.pow(-2) - eps
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0)
    return mean, variance


def _gradient_sums(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Sums over this rank's rows of dy and of dy (x - mean), each (C,)."""
    inverse_std = (variance + eps).rsqrt()
    if x.is_cuda:
        return torch.batch_norm_backward_reduce(dy, x, mean, inverse_std, weight, True, False, False)[:2]
    _, sum_dy_normal, sum_dy = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, mean, variance, None, None, False, eps, [False, True, True]
    )
    return sum_dy, sum_dy_normal / inverse_std


def _input_gradient(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, inverse_std: Tensor, sum_dy: Tensor, sum_dy_centred: Tensor,
    rows: int,
) -> Tensor:  # fmt: skip
    """w / std (dy - mean dy - (x - mean) / std^2 mean(dy (x - mean))), the means over all ranks' rows."""
    if x.is_cuda:
        count = torch.full((1,), rows, dtype=torch.int32, device=x.device)
        return torch.batch_norm_backward_elemt(dy, x, mean, inverse_std, weight, sum_dy, sum_dy_centred, count)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    of_dy = weight * inverse_std
    of_x = -of_dy * inverse_std.square() * sum_dy_centred / rows
    constant = -of_dy * sum_dy / rows - of_x * mean
    dx = torch.addcmul(constant.view(shape), dy, of_dy.view(shape))
    return torch.addcmul(dx, x, of_x.view(shape)).to(x.dtype)


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
