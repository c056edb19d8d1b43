"""The optimiser and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastssl.settings import OptimConfig


def build_optimizer(method: nn.Module, config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """Over the parameters that take gradients. Raises ValueError if the fused form is not to be had."""
    groups = parameter_groups(method, config.weight_decay, config.weight_decay_on)
    fused = config.fused == "torch" or None
    if config.fused == "apex" and config.name != "sgd":
        raise ValueError(f"optim.fused is 'apex', which fastssl offers for sgd only, not {config.name}; say torch")
    if config.name == "lars":
        from timm.optim import Lars

        groups[0]["always_adapt"] = True  # timm otherwise rescales only where there is weight decay
        return Lars(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, trust_coeff=config.trust)
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=config.lr, fused=fused)
    options: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "nesterov": config.nesterov}
    if config.fused == "apex":
        return _apex_sgd(groups, options, device)
    optimizer = torch.optim.SGD(groups, **options, fused=fused)
    if config.momentum:
        # torch's fused kernel fails when a tensor's first gradient comes after the others' (SwAV's frozen prototypes).
        # A momentum that starts as zero makes the same first step as one that does not exist.
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


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
