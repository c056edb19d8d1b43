"""What the methods of the MoCo family share: a momentum encoder for the keys, and a queue of the keys it made.

He et al., arXiv:1911.05722. Departures from the authors' code, none of which changes a step's numbers:
- the queue is stored row-major (K, C) and wraps round, so that K need not be a multiple of the batch;
- the key encoder moves before the query's forward instead of after it: the forward changes no parameter;
- keys enter the queue after the optimiser step instead of before the backward: the loss saw the old queue either way;
- the shuffle of a step is a pure function of (seed, step) instead of rank 0's broadcast.
Running statistics of the key encoder's batch norm are its own, neither copied nor averaged, as in the authors' code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.methods.base import Method, Output, RunFacts
from fastssl.nn.split_batchnorm import split_batchnorm_
from fastssl.nn.sync_batchnorm import sync_batchnorm_
from fastssl.settings import require

# B images per rank, W ranks, C embedding width (dim), K queue length


@dataclass(frozen=True)
class MomentumConfig:
    """Hyper-parameters of the family.

    head        "linear": one layer (v1); "mlp": a ReLU MLP as wide as the features (v2); "none": the features
    batch_norm  "shuffle": the key batch is shuffled over the ranks (section 3.3); on one process "split" stands in
                "split": statistics over split_groups parts of the batch, the keys in another order than the queries
                "sync": statistics over all ranks
                "plain": neither
    """

    name: str
    dim: int = 128
    queue_length: int = 65536
    momentum: float = 0.999
    temperature: float = 0.2
    head: Literal["none", "linear", "mlp"] = "mlp"
    batch_norm: Literal["shuffle", "split", "sync", "plain"] = "shuffle"
    split_groups: int = 8

    def __post_init__(self) -> None:
        require(self.dim >= 1, "method.dim", self.dim, "1 or more")
        require(self.queue_length >= 1, "method.queue_length", self.queue_length, "1 or more")
        require(0.0 <= self.momentum <= 1.0, "method.momentum", self.momentum, "between 0 and 1")
        require(self.temperature > 0.0, "method.temperature", self.temperature, "above 0")
        require(self.split_groups >= 1, "method.split_groups", self.split_groups, "1 or more")


class MomentumMethod(Method):
    """Query encoder, key encoder, queue. A subclass has a forward whose `carry` is the keys to enqueue, a tuple."""

    own_buffers: ClassVar[tuple[str, ...]] = ("queue", "num_enqueued")
    queue: Tensor
    num_enqueued: Tensor

    def __init__(self, backbone: nn.Module, config: MomentumConfig, facts: RunFacts) -> None:
        super().__init__()
        self.seed = facts.seed
        self.images_per_epoch = facts.clock.steps_per_epoch * facts.clock.batch_size
        self.momentum, self.batch_norm = config.momentum, config.batch_norm
        self.encoder_q = Encoder(backbone, config.dim, config.head)
        self._choose_batch_norm(config.split_groups)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_length, config.dim), dim=1))
        self.register_buffer("num_enqueued", torch.zeros((), dtype=torch.int64))

    def backbone(self) -> nn.Module:
        return self.encoder_q.backbone

    def advice(self) -> list[str]:
        length, images = len(self.queue), self.images_per_epoch
        sentence = (
            f"method.queue_length {length} is not smaller than the {images} images of an epoch, so that a query meets "
            "its own older keys as negatives; a quarter of the data set or less is usual"
        )
        return [sentence] if length >= images else []

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """k <- m k + (1 - m) q, parameters only (eq. 2), in the weights' own precision."""
        torch._foreach_lerp_(list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1.0 - self.momentum)

    @torch.no_grad()
    def after_step(self, output: Output) -> None:
        """Overwrite the oldest keys with those of all ranks, in rank order."""
        self.enqueue_([dist.all_gather(part) for part in output.carry])

    @torch.no_grad()
    def enqueue_(self, keys_of_all_ranks: Sequence[Tensor]) -> None:
        keys = torch.cat(list(keys_of_all_ranks)).to(self.queue.dtype)[-len(self.queue) :]
        places = (self.num_enqueued + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys)
        self.num_enqueued += len(keys)

    def queries(self, view: Tensor) -> Tensor:
        """(B, C) unit queries of this rank's views."""
        return unit_rows(self.encoder_q(view))

    @torch.no_grad()
    def keys(self, view: Tensor, draw: int) -> Tensor:
        """(B, C) unit keys of this rank's views, each encoded among companions other than its query's.

        draw    number of the shuffle; equal on all ranks
        """
        keys, shared = self._shuffled_keys(view, draw)
        return keys.view(dist.world(), -1, keys.shape[1])[dist.rank()] if shared else keys

    @torch.no_grad()
    def keys_of_all_ranks(self, view: Tensor, draw: int) -> Tensor:
        """(W * B, C) the same of all ranks in rank order, gathered once."""
        keys, shared = self._shuffled_keys(view, draw)
        return keys if shared else dist.all_gather(keys)

    def shuffle(self, batch: int, draw: int, device: torch.device) -> tuple[Tensor, bool]:
        """The order of shuffle `draw`, and whether it goes over all ranks (W * B images) or within this one (B)."""
        shared = self.batch_norm == "shuffle" and dist.world() > 1
        return dist.permutation(batch * (dist.world() if shared else 1), self.seed, draw).to(device), shared

    def in_order(self, keys: Tensor, order: Tensor, shared: bool) -> Tensor:
        """Undo a shuffle: rows `order` of the batch, or of all ranks' if it is shared, back to their own places."""
        return (dist.all_gather(keys) if shared else keys)[order.argsort()]

    def _shuffled_keys(self, view: Tensor, draw: int) -> tuple[Tensor, bool]:
        """Unit keys in their own places, and whether they are those of all ranks."""
        if self.batch_norm not in ("shuffle", "split"):
            return unit_rows(self.encoder_k(view)), False
        order, shared = self.shuffle(len(view), draw, view.device)
        images = dist.all_gather(view) if shared else view
        mine = order.view(dist.world(), -1)[dist.rank()] if shared else order
        keys = unit_rows(self.encoder_k(images[mine].contiguous(memory_format=_memory_format(view))))
        return self.in_order(keys, order, shared), shared

    def queue_filled(self) -> Tensor:
        """Share of the queue that holds keys of images instead of the random vectors it starts with."""
        return (self.num_enqueued / len(self.queue)).clamp(max=1.0)

    def _choose_batch_norm(self, split_groups: int) -> None:
        if self.batch_norm == "sync" and dist.world() > 1:
            sync_batchnorm_(self.encoder_q)
        if self.batch_norm == "split" or (self.batch_norm == "shuffle" and dist.world() == 1):
            split_batchnorm_(self.encoder_q, split_groups)


class Encoder(nn.Module):
    """Backbone and projection head."""

    def __init__(self, backbone: nn.Module, dim: int, head: str) -> None:
        super().__init__()
        width: int = backbone.num_features  # type: ignore[assignment]
        self.backbone = backbone
        self.head: nn.Module = nn.Identity()
        if head == "none" and width != dim:
            raise ValueError(
                f"method.dim is {dim}, but with method.head none it must be the encoder's {width} features"
            )
        if head == "linear":
            self.head = nn.Linear(width, dim)
        if head == "mlp":
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1, in at least float32 (eps 1e-12, as the authors')."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
