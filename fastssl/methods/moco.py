"""MoCo v1 and v2: a query encoder learns to find its key among a queue of keys from a slowly moving encoder.

He et al., arXiv:1911.05722 (v1, algorithm 1); Chen et al., arXiv:2003.04297 (v2: MLP head, stronger views, cosine).
What departs from the authors' code is listed in momentum.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from fastssl import dist
from fastssl.losses import info_nce
from fastssl.methods.base import Output, RunFacts, Views, require_roles
from fastssl.methods.momentum import MomentumConfig, MomentumMethod

# B images per rank, C embedding width (dim), K queue length


@dataclass(frozen=True)
class MocoConfig(MomentumConfig):
    """The presets moco_v1 and moco_v2 hold the published values.

    symmetric   both views serve as query and as key; the sum of both losses, and both keys enter the queue
    """

    name: str = "moco"
    symmetric: bool = False


class Moco(MomentumMethod):
    """Views: `query` 1 and `key` 1, each (B, 3, S, S)."""

    def __init__(self, backbone: nn.Module, config: MocoConfig, facts: RunFacts) -> None:
        require_roles("moco", facts.roles, {"query": 1, "key": 1})
        super().__init__(backbone, config, facts)
        self.config = config

    def forward(self, views: Views, step: int) -> Output:
        (query_view,), (key_view,) = views["query"], views["key"]
        if not self.config.symmetric:
            keys = self.keys(key_view, step)
            loss, logs = self._contrast(query_view, keys)
            return Output(loss, {**logs, "queue_filled": self.queue_filled()}, carry=(keys,))
        keys_of_key, keys_of_query = self.keys(key_view, 2 * step), self.keys(query_view, 2 * step + 1)
        first, logs_1 = self._contrast(query_view, keys_of_key)
        second, logs_2 = self._contrast(key_view, keys_of_query)
        logs = {name: (logs_1[name] + logs_2[name]) / 2 for name in logs_1}
        return Output(first + second, {**logs, "queue_filled": self.queue_filled()}, carry=(keys_of_query, keys_of_key))

    def chance_level(self) -> float:
        """ln(K + 1) for each direction of the loss."""
        return math.log(len(self.queue) + 1) * (2 if self.config.symmetric else 1)

    def _contrast(self, view: Tensor, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return info_nce(self.queries(view), dist.own_rows(keys), self.queue, self.config.temperature)
