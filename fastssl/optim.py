"""The optimiser and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.settings import OptimConfig


def build_optimizer(method: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """Over the parameters that take gradients. Raises ValueError if the fused form is not to be had."""
    groups = parameter_groups(method, config.weight_decay, config.weight_decay_on)
    fused = config.fused == "torch" or None
    if config.fused == "apex" and config.name != "sgd":
        raise ValueError(f"optim.fused is 'apex', which fastssl offers for sgd only, not {config.name}; say torch")
    if config.name == "adam":
        # Without the fused kernel a GPU's count of steps would lie on the host, where no rejected step is taken back.
        on_device = not fused and device.type == "cuda"
        adam = torch.optim.Adam(groups, lr=config.lr, fused=fused, capturable=on_device)
        start_adam_(adam)
        return adam
    options: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "nesterov": config.nesterov}
    if config.fused == "apex":
        return _apex_sgd(groups, options, device)
    optimizer: torch.optim.Optimizer
    if config.name == "lars":
        optimizer = Lars([{**groups[0], "trust": config.trust}, *groups[1:]], **options, fused=fused)
    else:
        optimizer = torch.optim.SGD(groups, **options, fused=fused)
    if config.momentum:
        # torch's fused kernel fails when a tensor's first gradient comes after the others' (SwAV's frozen prototypes).
        # A momentum that starts as zero makes the same first step as one that does not exist.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def start_adam_(adam: torch.optim.Adam) -> None:
    """The state that its first step would make, so that a first step can be taken back."""
    for group in adam.param_groups:
        for p in group["params"]:
            count = torch.zeros((), device=p.device if group["fused"] or group["capturable"] else "cpu")
            adam.state[p] = {"step": count, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


class Lars(torch.optim.SGD):
    """SGD whose gradients are first rescaled, tensor by tensor (You et al., arXiv:1708.03888; LARC with clip=False).

    In groups with a `trust` above 0, g becomes (g + d w) trust |w| / (|g| + d |w| + 1e-8), d being the group's
    `weight_decay`; where |w| or |g| is 0 it stays as it is. Groups without trust are plain SGD. Gradients are changed
    in place and SGD's fused kernel does the rest. Beside timm's Lars, the host never waits, not even under a
    GradScaler, whose scale and finding of infinities go to that kernel.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__(groups, **options)
        for group in self.param_groups:
            group.setdefault("trust", 0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is None
        decays = [group["weight_decay"] for group in self.param_groups]
        if (scale := getattr(self, "grad_scale", None)) is not None:
            torch._foreach_mul_(
                [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None], 1 / scale
            )
            self.grad_scale = None
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if group["trust"] and weights:
                _rescale_(weights, [p.grad for p in weights], group["trust"], group["weight_decay"])
                group["weight_decay"] = 0.0  # it is in the gradients now
        super().step()
        for group, decay in zip(self.param_groups, decays):
            group["weight_decay"] = decay


def _rescale_(weights: list[Tensor], gradients: list[Tensor], trust: float, decay: float) -> None:
    w, g = (torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, gradients))
    both = (w > 0) & (g > 0)
    factors = torch.where(both, trust * w / (g + decay * w + 1e-8), 1.0)
    torch._foreach_addcmul_(gradients, weights, list((decay * both.to(w.dtype)).unbind()))
    torch._foreach_mul_(gradients, list(factors.unbind()))


def parameter_groups(method: nn.Module, weight_decay: float, weight_decay_on: str) -> list[dict[str, Any]]:
    """One group with decay and, for weight_decay_on "weights", a second of biases and norms (1-d tensors) without."""
    trainable = [p for p in method.parameters() if p.requires_grad]
    if weight_decay_on == "all":
        return [{"params": trainable, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _apex_sgd(groups: list[dict[str, Any]], options: dict[str, Any], device: torch.device) -> torch.optim.Optimizer:
    try:
        from apex.optimizers import FusedSGD
    except ImportError as error:
        raise ValueError(
            "optim.fused is 'apex', but NVIDIA Apex's optimisers cannot be imported "
            "(PyPI's `apex` is another project: build NVIDIA's from source); or say optim.fused=torch"
        ) from error
    if device.type != "cuda":
        raise ValueError("optim.fused is 'apex', whose kernels run on GPUs only; say optim.fused=torch")
    return FusedSGD(groups, **options)
