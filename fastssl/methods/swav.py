"""SwAV: each view of an image predicts the cluster that another view was assigned to, among prototypes that are learnt.

Caron et al., arXiv:2006.09882. Departures from the authors' code; in float32 only the last changes a step's numbers:
- embeddings enter the queue after the optimiser step instead of between its scores and Sinkhorn: nothing reads them
  in between;
- the queue counts what it holds instead of testing its last row for zeros, and is saved at any step;
- Sinkhorn subtracts the largest score, and scores, softmax and codes are float32 at any precision;
- batch norms are synchronised over all ranks, as in the authors' scripts for 4 GPUs; those for 64 GPUs use groups of 8.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.losses import feature_std, sinkhorn, swapped_prediction, usage_entropy
from fastssl.methods.base import Method, Output, RunFacts, Views, require_roles
from fastssl.methods.momentum import unit_rows
from fastssl.nn.sync_batchnorm import sync_batchnorm_
from fastssl.settings import require

# B images per rank, W ranks, G = W * B, V views, C embedding width (dim), P prototypes, L queue length of a rank

ASSIGNED = 2  # views of role `global`: the ones whose codes are predicted


@dataclass(frozen=True)
class Queue:
    """Embeddings of past images: rows (2, L, C), the newest first, of which `filled` are there."""

    rows: Tensor
    filled: int

    @property
    def full(self) -> bool:
        return 0 < self.rows.shape[1] == self.filled

    @torch.no_grad()
    def push(self, embeddings: Tensor) -> Queue:
        """With (2, B, C) in front; the oldest fall out."""
        length = self.rows.shape[1]
        rows = torch.cat([embeddings.to(self.rows.dtype), self.rows], 1)[:, :length]
        return Queue(rows, min(self.filled + embeddings.shape[1], length))


@dataclass(frozen=True)
class SwavConfig:
    """The presets hold the published values; the recipes of SwAV add the queue, the freezing and the length of a run.

    hidden              width of the projection head's hidden layer
    epsilon             Sinkhorn's entropy weight (losses.sinkhorn); sinkhorn_iterations: its rounds
    hard_assignment     codes are rounded to one prototype each
    queue_length        embeddings of past images, over all ranks and for each of the two global views, that stand in
                        for a larger batch in Sinkhorn; rounded down to a multiple of run.batch_size. 0: none
    queue_from          when the queue starts to fill; it is used from the moment it is full
    freeze_prototypes   how long the prototypes keep their directions at the start
    batch_norm          "sync": statistics over all ranks; "plain": over each rank's own rows
    merge_crops         views of one size pass the encoder, and its batch norms, together; false: each view alone.
                        The projection head sees all views at once in either case
    """

    name: str = "swav"
    dim: int = 128
    hidden: int = 2048
    num_prototypes: int = 3000
    temperature: float = 0.1
    epsilon: float = 0.05
    sinkhorn_iterations: int = 3
    hard_assignment: bool = False
    queue_length: int = 0
    queue_from: str = "15ep"
    freeze_prototypes: str = "1ep"
    batch_norm: Literal["sync", "plain"] = "sync"
    merge_crops: bool = True

    def __post_init__(self) -> None:
        require(self.dim >= 1, "method.dim", self.dim, "1 or more")
        require(self.hidden >= 1, "method.hidden", self.hidden, "1 or more")
        require(self.num_prototypes >= 2, "method.num_prototypes", self.num_prototypes, "2 or more")
        require(self.temperature > 0.0, "method.temperature", self.temperature, "above 0")
        remedy = "0.025 or more: e^(-2/epsilon) is 0 in float32 well below that"
        require(self.epsilon >= 0.025, "method.epsilon", self.epsilon, remedy)
        require(self.sinkhorn_iterations >= 1, "method.sinkhorn_iterations", self.sinkhorn_iterations, "1 or more")
        require(self.queue_length >= 0, "method.queue_length", self.queue_length, "0 (no queue) or more")


class Swav(Method):
    """Views: `global` 2, whose codes are predicted, and any number of `local`, which only predict; (B, 3, S, S)."""

    own_buffers: ClassVar[tuple[str, ...]] = ("queue", "num_queued")
    queue: Tensor  # (2, L, C), newest rows first; each rank has its own
    num_queued: Tensor

    def __init__(self, backbone: nn.Module, config: SwavConfig, facts: RunFacts) -> None:
        require_roles(config.name, facts.roles, {"global": ASSIGNED}, local=0)
        super().__init__()
        self.config, self.clock = config, facts.clock
        self.frozen_steps = facts.clock.steps(config.freeze_prototypes, "method.freeze_prototypes")
        self.queue_from = facts.clock.steps(config.queue_from, "method.queue_from")
        width: int = backbone.num_features  # type: ignore[assignment]
        self.encoder = backbone
        self.projection_head = nn.Sequential(
            nn.Linear(width, config.hidden),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.dim),
        )
        self.prototypes = nn.Linear(config.dim, config.num_prototypes, bias=False)
        if config.batch_norm == "sync" and dist.world() > 1:
            sync_batchnorm_(self)
        rows = config.queue_length // facts.clock.batch_size * facts.clock.batch_size // dist.world()
        self.register_buffer("queue", torch.zeros(ASSIGNED, rows, config.dim), persistent=False)
        self.register_buffer("num_queued", torch.zeros((), dtype=torch.int64), persistent=False)
        self._known_full = False

    def forward(self, views: Views, step: int) -> Output:
        crops = [*views["global"], *views.get("local", ())]
        embeddings = self.embed(crops)
        scores, queue = self.scores(embeddings), self.queue_before(step)
        codes = self.codes(scores[:ASSIGNED], queue)
        loss = swapped_prediction(scores, codes, self.config.temperature)
        return Output(loss, self.logs(embeddings, codes), carry=self.pushed(queue, embeddings[:ASSIGNED], step))

    def backbone(self) -> nn.Module:
        return self.encoder

    def chance_level(self) -> float:
        """ln P: every prototype equally likely."""
        return math.log(self.config.num_prototypes)

    def moved_before_step(self) -> list[Tensor]:
        return [self.prototypes.weight]

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Prototypes back to unit length, also while they are frozen."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def after_backward(self, step: int) -> None:
        """No gradient at all for frozen prototypes: neither momentum nor weight decay must move them."""
        if step < self.frozen_steps:
            self.prototypes.weight.grad = None

    @torch.no_grad()
    def after_step(self, output: Output) -> None:
        """Put the queue that the forward left in place of the one it read."""
        queue: Queue = output.carry
        if queue.rows is not self.queue:
            self.queue.copy_(queue.rows)
            self.num_queued.fill_(queue.filled)

    def queue_before(self, step: int) -> Queue:
        """The queue that a step finds.

        How much of it is filled decides what the step computes. A step that was rejected has not filled it, so the
        host waits for the device while it fills: not before that, and no longer once it is full.
        """
        length = self.queue.shape[1]
        filled = length if self._known_full else 0
        if length and not self._known_full and step > self.queue_from:
            filled = int(self.num_queued)
            self._known_full = filled == length
        return Queue(self.queue, filled)

    def embed(self, crops: Sequence[Tensor]) -> Tensor:
        """(V, B, C) unit embeddings, in the order of the crops."""
        alike = itertools.groupby(crops, key=lambda crop: crop.shape[-1]) if self.config.merge_crops else None
        batches = [list(group) for _, group in alike] if alike else [[crop] for crop in crops]
        features = torch.cat([self.encoder(torch.cat(batch)) for batch in batches])
        return unit_rows(self.projection_head(features)).unflatten(0, (len(crops), -1))

    def scores(self, embeddings: Tensor) -> Tensor:
        """(..., P) cosines with the prototypes, in at least float32."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.prototypes(embeddings)

    @torch.no_grad()
    def codes(self, scores: Tensor, queue: Queue) -> list[Tensor]:
        """Codes (B, P) of the first views' scores (2 or 1, B, P), balanced over all ranks and, if full, with the queue.

        The queue's old embeddings meet today's prototypes, as in the authors' code.
        """
        if queue.full:
            scores = torch.cat([self.scores(queue.rows[: len(scores)]), scores], 1)
        settings = self.config
        codes = [sinkhorn(s, settings.epsilon, settings.sinkhorn_iterations, settings.hard_assignment) for s in scores]
        return [c[queue.rows.shape[1] :] for c in codes] if queue.full else codes

    def pushed(self, queue: Queue, embeddings: Tensor, step: int) -> Queue:
        """The queue with the embeddings (2, B, C) in front; the same before `queue_from` or if there is none."""
        return queue.push(embeddings) if self.queue.shape[1] and step >= self.queue_from else queue

    def logs(self, embeddings: Tensor, codes: Sequence[Tensor]) -> dict[str, Tensor]:
        logs = {"feature_std": feature_std(embeddings[0]), "prototype_entropy": usage_entropy(torch.stack(list(codes)))}
        if self.queue.shape[1]:
            logs["queue_filled"] = self.num_queued / self.queue.shape[1]
        return logs

    def rank_state(self) -> dict[str, Tensor]:
        return {"queue": self.queue, "num_queued": self.num_queued} if self.queue.shape[1] else {}

    def load_rank_states(self, states: Sequence[Mapping[str, Tensor]]) -> str | None:
        if not self.queue.shape[1]:
            return None
        own, self._known_full = self._own_queue([Queue(s["queue"], int(s["num_queued"])) for s in states]), False
        if own is None:
            steps = self.queue.shape[1] * dist.world() // self.clock.batch_size
            return (
                f"the queues of the {len(states)} ranks before cannot be dealt to {dist.world()}; the queue starts "
                f"empty, and codes do without it until {steps} steps have filled it"
            )
        self.queue.copy_(own.rows)
        self.num_queued.fill_(own.filled)
        return None

    def _own_queue(self, queues: Sequence[Queue]) -> Queue | None:
        """This rank's part of what all ranks of the life before held; None if ranks cannot have it in equal steps."""
        world, batch = dist.world(), self.clock.batch_size
        if len(queues) == world:
            return queues[dist.rank()]
        length, filled, share = queues[0].rows.shape[1], queues[0].filled, batch // len(queues)
        alike = all((queue.rows.shape[1], queue.filled) == (length, filled) for queue in queues)
        whole_steps = share * len(queues) == batch and length % share == filled % share == batch % world == 0
        if not alike or not whole_steps or length * len(queues) != self.queue.shape[1] * world:
            return None
        return Queue(redealt([q.rows for q in queues], batch, world)[dist.rank()], filled * len(queues) // world)

    def advice(self) -> list[str]:
        asked, batch, prototypes = self.config.queue_length, self.clock.batch_size, self.config.num_prototypes
        queue = self.queue.shape[1] * dist.world()
        sentences = []
        if queue != asked:
            sentences.append(
                f"method.queue_length {asked} is not a multiple of run.batch_size {batch}; the queue "
                + (f"holds {queue}" if queue else "is left out")
            )
        if batch + queue < prototypes:
            sentences.append(
                f"run.batch_size {batch} and a queue of {queue} are fewer than method.num_prototypes {prototypes}, so "
                f"that Sinkhorn cannot use every prototype; take fewer prototypes or a longer method.queue_length"
            )
        return sentences


def redealt(rows: Sequence[Tensor], batch_size: int, world: int) -> Tensor:
    """Rows (2, L, C) of each of W queues in rank order -> (world, 2, L W / world, C), as `world` ranks would hold them.

    A step puts batch_size / W rows of each rank in front, which together are the rows of its global batch, in order.
    """
    steps = torch.stack([own.unflatten(1, (-1, batch_size // len(rows))) for own in rows], 2)  # (2, steps, W, B, C)
    return steps.flatten(2, 3).unflatten(2, (world, -1)).movedim(2, 0).flatten(2, 3)
