"""What the methods of the MoCo family share: a momentum encoder for the keys, and a queue of the keys it made.

He et al., arXiv:1911.05722. Departures from the authors' code, none of which changes a step's numbers:
- the queue is stored row-major (K, C) and wraps round, so that K need not be a multiple of the batch;
- the key encoder moves before the query's forward instead of after it: the forward changes no parameter;
- keys enter the queue after the optimiser step instead of before the backward: the loss saw the old queue either way;
- the shuffle of a step is a pure function of (seed, step) instead of rank 0's broadcast;
- it deals each rank's key images out to all ranks in equal parts, so that a rank receives B images instead of W * B
  (`key_exchange`), and the keys of all ranks are gathered once, for the loss and the queue.
Running statistics of the key encoder's batch norm are its own, neither copied nor averaged, as in the authors' code.
"""

from __future__ import annotations

import copy
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
    key_exchange    how the shuffle brings key images to other ranks. "deal": each rank sends an equal, random part of
                its images to every rank, B images in and out; where W does not divide B, or if "gather", all ranks get
                all W * B images and take a random B of them, as published. Without a shuffle no image travels
    """

    name: str
    dim: int = 128
    queue_length: int = 65536
    momentum: float = 0.999
    temperature: float = 0.2
    head: Literal["none", "linear", "mlp"] = "mlp"
    batch_norm: Literal["shuffle", "split", "sync", "plain"] = "shuffle"
    split_groups: int = 8
    key_exchange: Literal["deal", "gather"] = "deal"

    def __post_init__(self) -> None:
        require(self.dim >= 1, "method.dim", self.dim, "1 or more")
        require(self.queue_length >= 1, "method.queue_length", self.queue_length, "1 or more")
        require(0.0 <= self.momentum <= 1.0, "method.momentum", self.momentum, "between 0 and 1")
        require(self.temperature > 0.0, "method.temperature", self.temperature, "above 0")
        require(self.split_groups >= 1, "method.split_groups", self.split_groups, "1 or more")


class MomentumMethod(Method):
    """Query encoder, key encoder, queue. A forward's `carry` is a tuple of what to enqueue: keys of all ranks."""

    own_buffers: ClassVar[tuple[str, ...]] = ("queue", "num_enqueued")
    queue: Tensor
    num_enqueued: Tensor

    def __init__(self, backbone: nn.Module, config: MomentumConfig, facts: RunFacts) -> None:
        super().__init__()
        self.seed = facts.seed
        self.images_per_epoch = facts.clock.steps_per_epoch * facts.clock.batch_size
        self.momentum, self.batch_norm, self.key_exchange = config.momentum, config.batch_norm, config.key_exchange
        self.encoder_q = Encoder(backbone, config.dim, config.head)
        self._choose_batch_norm(config.split_groups)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_length, config.dim), dim=1))
        self.register_buffer("num_enqueued", torch.zeros((), dtype=torch.int64))

    def backbone(self) -> nn.Module:
        return self.encoder_q.backbone

    def encoders(self) -> list[nn.Module]:
        return [self.encoder_q.backbone, self.encoder_k.backbone]

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
        keys = torch.cat(output.carry).to(self.queue.dtype)[-len(self.queue) :]
        places = (self.num_enqueued + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys)
        self.num_enqueued += len(keys)

    def queries(self, view: Tensor) -> Tensor:
        """(B, C) unit queries of this rank's views."""
        return unit_rows(self.encoder_q(view))

    @torch.no_grad()
    def keys(self, view: Tensor, draw: int) -> Tensor:
        """(W * B, C) unit keys of all ranks' views in rank order, each encoded among companions not its query's.

        draw    number of the shuffle; equal on all ranks
        """
        if self.batch_norm not in ("shuffle", "split"):
            return dist.all_gather(unit_rows(self.encoder_k(view)))
        order = self.shuffle(len(view), draw, view.device)
        images = self._images_that_fall_to_this_rank(view, order)
        return self.in_order(unit_rows(self.encoder_k(images.contiguous(memory_format=_memory_format(view)))), order)

    def shuffle(self, batch: int, draw: int, device: torch.device) -> Tensor:
        """The order (W * B) in which shuffle `draw` lets all ranks' images be encoded, B by each rank.

        With batch_norm "split" no image leaves its rank.
        """
        world = dist.world()
        if self.batch_norm == "shuffle" and not self._deals(batch):
            return dist.shuffled_places(world * batch, self.seed, draw, device)
        inside = dist.shuffled_places(world * batch, self.seed, draw, device, parts=world)
        if self.batch_norm == "split":
            return inside
        return inside.view(world, world, -1).transpose(0, 1).flatten()  # from (sender, receiver, rows)

    def in_order(self, keys: Tensor, order: Tensor) -> Tensor:
        """Keys (B, C) of the images order.view(W, B)[rank] -> those of all ranks (W * B, C) in their own places."""
        return dist.all_gather(keys)[order.argsort()]

    def _images_that_fall_to_this_rank(self, view: Tensor, order: Tensor) -> Tensor:
        world, rank = dist.world(), dist.rank()
        mine = order.view(world, -1)[rank]
        if world == 1 or self.batch_norm == "split":
            return view[mine - rank * len(view)]
        if self._deals(len(view)):
            return dist.all_to_all(view[order.view(world, world, -1)[:, rank].flatten() - rank * len(view)])
        return dist.all_gather(view)[mine]

    def _deals(self, batch: int) -> bool:
        return self.key_exchange == "deal" and batch % dist.world() == 0

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
