"""A linear probe that learns beside the method, from the features that its step computes anyway.

A sign of life while training, and no published protocol: each batch is classified before it is learnt from, on one
augmented view of training images, while the features still move. Report what fastssl-evaluate says instead. Each row
of features is brought to mean 0 and deviation 1, so that one learning rate suits every method and encoder, and the
layer starts at 0. The method does not feel it: features are detached, no random number is drawn, and the optimiser is
its own.
"""

# B images of a rank's batch, F feature width, C classes
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastssl import dist
from fastssl.methods import Method
from fastssl.optim import set_lr, start_adam_
from fastssl.rejection import Kept
from fastssl.settings import OnlineConfig
from shard_tools.manifest import Manifest, ShardError


class OnlineProbe:
    """Catches features in the backbone's forward of a step; `learn` the step's labels afterwards.

    The first rows of the first forward in train mode must be one view of the batch, in its order: so it is in every
    method here (query, first global crop, first weak crop). Ranks average gradients and so keep the same layer.
    """

    def __init__(self, method: Method, num_classes: int, config: OnlineConfig, device: torch.device | str) -> None:
        backbone = method.backbone()
        width: int = backbone.num_features  # type: ignore[assignment]
        self.layer = nn.utils.skip_init(nn.Linear, width, num_classes, device=device)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)
        # On a GPU torch's fused kernel has its count of steps there, where a step can be taken back.
        on_gpu = torch.device(device).type == "cuda"
        self.optimizer = torch.optim.Adam(self.layer.parameters(), lr=config.lr, fused=on_gpu or None)
        start_adam_(self.optimizer)
        self._kept: Kept | None = None  # made by the first step, after a resume
        self._features: Tensor | None = None
        backbone.register_forward_hook(self._catch)

    def learn(self, labels: Tensor, rejected: Tensor | None = None) -> dict[str, Tensor]:
        """One step on labels (B,) that lie on the device, and how this rank's batch was classified before it.

        rejected    boolean scalar on the device, equal on all ranks: then, or if the probe's own gradients are not
                    finite, layer and optimiser stay as they are
        Returns scalars "online/top1" and "online/loss" without gradient; nothing waits for the device.
        """
        assert self._features is not None
        features, self._features = self._features[: len(labels)].float(), None
        with torch.enable_grad():
            logits = self.layer(functional.layer_norm(features, features.shape[1:]))
            loss = functional.cross_entropy(logits, labels)
        if self._kept is None:
            states = [t for state in self.optimizer.state.values() for t in state.values()]
            self._kept = Kept([*self.layer.parameters(), *states])
        self._kept.keep()
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in self.layer.parameters():
            assert parameter.grad is not None
            parameter.grad = dist.all_reduce_mean(parameter.grad)
        taken = torch.stack([p.grad.isfinite().all() for p in self.layer.parameters() if p.grad is not None]).all()
        self.optimizer.step()
        self._kept.put_back(~taken if rejected is None else rejected | ~taken)
        return {"online/top1": (logits.detach().argmax(1) == labels).float().mean(), "online/loss": loss.detach()}

    def state_dict(self) -> dict[str, Any]:
        return {"layer": self.layer.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.layer.load_state_dict(state["layer"])
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.load_state_dict(state["optimizer"])
        set_lr(self.optimizer, lr)  # a resume may change it, as it may change all that does not touch the method

    def _catch(self, backbone: nn.Module, images: tuple[Tensor, ...], features: Tensor) -> None:
        if backbone.training and self._features is None:  # not the kNN monitor's forwards, nor a step's later ones
            self._features = features.detach()


def online_probe(
    config: OnlineConfig, manifest: Manifest, method: Method, device: torch.device | str
) -> OnlineProbe | None:
    """The probe that the settings ask for, if any. Raises ShardError with the remedy if images have no labels."""
    if config.probe == "off":
        return None
    without = int((manifest.index()["label"] < 0).sum())
    if without or not manifest.classes:
        raise ShardError(
            f"{without} of the {manifest.num_samples} images of {manifest.place} have no label, which the online probe "
            "needs; pack them with classes, or say online.probe=off"
        )
    return OnlineProbe(method, len(manifest.classes), config, device)
