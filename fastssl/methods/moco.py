"""MoCo v1 and v2: a query encoder learns to find its key among a queue of keys from a slowly moving encoder.

He et al., arXiv:1911.05722 (v1, algorithm 1); Chen et al., arXiv:2003.04297 (v2: MLP head, stronger views, cosine).

Departures from the authors' code, none of which changes a step's numbers:
- the queue is stored row-major (K, C) and wraps round, so that K need not be a multiple of the batch;
- the key encoder moves before the query's forward instead of after it: the forward changes no parameter;
- keys enter the queue after the optimiser step instead of before the backward: the loss saw the old queue either way;
- the shuffle of a step is a pure function of (seed, step) instead of rank 0's broadcast.
Running statistics of the key encoder's batch norm are its own, neither copied nor averaged, as in the authors' code.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.losses import info_nce
from fastssl.methods.base import Method, Output, Views, require_roles
from fastssl.nn.split_batchnorm import split_batchnorm_
from fastssl.settings import require

# B images per rank, W ranks, C embedding width (dim), K queue length


@dataclass(frozen=True)
class MocoConfig:
    """Hyper-parameters; the presets moco_v1 and moco_v2 hold the published values.

    batch_norm  "shuffle": the key batch is shuffled over the ranks (section 3.3); on one process "split" stands in
                "split": statistics over split_groups parts of the batch, the keys in another order than the queries
                "sync": statistics over all ranks (GPU only; torch has no CPU form)
                "plain": neither
    symmetric   both views serve as query and as key; the sum of both losses, and both keys enter the queue
    """

    name: str = "moco"
    dim: int = 128
    queue_length: int = 65536
    momentum: float = 0.999
    temperature: float = 0.2
    mlp: bool = True
    symmetric: bool = False
    batch_norm: Literal["shuffle", "split", "sync", "plain"] = "shuffle"
    split_groups: int = 8

    def __post_init__(self) -> None:
        require(self.dim >= 1, "method.dim", self.dim, "1 or more")
        require(self.queue_length >= 1, "method.queue_length", self.queue_length, "1 or more")
        require(0.0 <= self.momentum <= 1.0, "method.momentum", self.momentum, "between 0 and 1")
        require(self.temperature > 0.0, "method.temperature", self.temperature, "above 0")
        require(self.split_groups >= 1, "method.split_groups", self.split_groups, "1 or more")


class Moco(Method):
    """Views: `query` 1 and `key` 1, each (B, 3, S, S). `seed` fixes the shuffles."""

    rank_equal_buffers: ClassVar[tuple[str, ...]] = ("queue", "num_enqueued")
    queue: Tensor
    num_enqueued: Tensor

    def __init__(self, backbone: nn.Module, config: MocoConfig, roles: dict[str, int], seed: int = 0) -> None:
        super().__init__()
        require_roles("moco", roles, {"query": 1, "key": 1})
        self.config = config
        self.seed = seed
        self.encoder_q = Encoder(backbone, config.dim, config.mlp)
        self._choose_batch_norm()
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(config.queue_length, config.dim), dim=1))
        self.register_buffer("num_enqueued", torch.zeros((), dtype=torch.int64))

    def forward(self, views: Views, step: int) -> Output:
        (query_view,), (key_view,) = views["query"], views["key"]
        if not self.config.symmetric:
            key = self._encode_key(key_view, step)
            loss, accuracy = self._contrast(query_view, key)
            return Output(loss, self._logs(accuracy), carry=(key,))
        key_of_key, key_of_query = self._encode_key(key_view, 2 * step), self._encode_key(query_view, 2 * step + 1)
        first, accuracy_1 = self._contrast(query_view, key_of_key)
        second, accuracy_2 = self._contrast(key_view, key_of_query)
        return Output(first + second, self._logs((accuracy_1 + accuracy_2) / 2), carry=(key_of_query, key_of_key))

    def backbone(self) -> nn.Module:
        return self.encoder_q.backbone

    def chance_level(self) -> float:
        """ln(K + 1) for each direction of the loss."""
        return math.log(self.config.queue_length + 1) * (2 if self.config.symmetric else 1)

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """k <- m k + (1 - m) q, parameters only (eq. 2), in the weights' own precision."""
        torch._foreach_lerp_(
            list(self.encoder_k.parameters()), list(self.encoder_q.parameters()), 1.0 - self.config.momentum
        )

    @torch.no_grad()
    def after_step(self, output: Output) -> None:
        """Overwrite the oldest keys with those of all ranks, in rank order."""
        keys = torch.cat([dist.all_gather(part) for part in output.carry]).to(self.queue.dtype)
        keys = keys[-self.config.queue_length :]
        places = (self.num_enqueued + torch.arange(len(keys), device=keys.device)) % self.config.queue_length
        self.queue.index_copy_(0, places, keys)
        self.num_enqueued += len(keys)

    def _contrast(self, view: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return info_nce(_unit(self.encoder_q(view)), key, self.queue, self.config.temperature)

    @torch.no_grad()
    def _encode_key(self, view: Tensor, draw: int) -> Tensor:
        """(B, C) unit keys of this rank's views, each encoded among companions other than its query's."""
        if self.config.batch_norm not in ("shuffle", "split"):
            return _unit(self.encoder_k(view))
        images = dist.all_gather(view) if self.config.batch_norm == "shuffle" else view
        order = dist.permutation(len(images), self.seed, draw).to(view.device)
        shared = self.config.batch_norm == "shuffle" and dist.world() > 1
        mine = order.view(dist.world(), -1)[dist.rank()] if shared else order
        keys = _unit(self.encoder_k(images[mine].contiguous(memory_format=_memory_format(view))))
        keys = dist.all_gather(keys) if shared else keys
        keys = keys[order.argsort()]
        return keys.view(dist.world(), -1, keys.shape[1])[dist.rank()] if shared else keys

    def _choose_batch_norm(self) -> None:
        mode = self.config.batch_norm
        if mode == "sync" and dist.world() > 1:
            if not torch.cuda.is_available():
                raise ValueError("method.batch_norm is 'sync', which torch offers on GPUs only; use shuffle on CPUs")
            self.encoder_q = nn.SyncBatchNorm.convert_sync_batchnorm(self.encoder_q)
        if mode == "split" or (mode == "shuffle" and dist.world() == 1):
            split_batchnorm_(self.encoder_q, self.config.split_groups)

    def _logs(self, accuracy: Tensor) -> dict[str, Tensor]:
        filled = (self.num_enqueued / self.config.queue_length).clamp(max=1.0)
        return {"contrast_top1": accuracy, "queue_filled": filled}


class Encoder(nn.Module):
    """Backbone and projection head: one linear layer (v1), or a ReLU MLP as wide as the features (v2)."""

    def __init__(self, backbone: nn.Module, dim: int, mlp: bool) -> None:
        super().__init__()
        width: int = backbone.num_features  # type: ignore[assignment]
        self.backbone = backbone
        self.head: nn.Module = nn.Linear(width, dim)
        if mlp:
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1, in at least float32 (eps 1e-12, as the authors')."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
