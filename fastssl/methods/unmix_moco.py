"""Un-Mix on MoCo: a mixture of two images is as near to each image's key as lambda says.

Shen et al., "Un-Mix: rethinking image mixtures for unsupervised visual representation learning", arXiv:2003.05438:
L = L(q, k) + lambda L(m, k) + (1 - lambda) L(m reversed, k). Only queries are mixed, each rank with its own draw. The
mixture in the reverse order is the mixed batch reversed, so its features are the features reversed, and one more
forward is all that Un-Mix costs. Departures from the authors' code, besides those in momentum.py and mixing.py:
- their option for a temperature of the mixture's own, which their code never reads, does not exist;
- their symmetric code forwards the first image's mixture twice, once for each set of keys. Here it passes once and its
  features serve both: the same loss and gradient, and one update of batch norm's running statistics fewer;
- the negatives of a mixture are scored once for both orders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.losses import info_nce
from fastssl.methods.base import Output, RunFacts, Views, require_roles
from fastssl.methods.moco import MocoConfig
from fastssl.methods.momentum import MomentumMethod
from fastssl.mixing import MixingConfig, Mixture, draw_mixture, mix

# B images per rank, C embedding width (dim), K queue length; q, m, k the rows of queries, mixtures and keys


@dataclass(frozen=True)
class UnmixMocoConfig(MocoConfig):
    """The presets unmix_moco, unmix_moco_v1 and unmix_moco_cifar hold the published values.

    mixing      how mixtures are drawn
    variant     of the symmetric form, "reference": the mixture of the first image meets both sets of keys, as in the
                authors' code, so that half of the mixture's loss pairs a mixture with the key of the very crop in it;
                "corrected": the second direction has a mixture of its own query, the second image
    """

    name: str = "unmix_moco"
    mixing: MixingConfig = field(default_factory=MixingConfig)
    variant: Literal["reference", "corrected"] = "reference"


class UnmixMoco(MomentumMethod):
    """Views: `query` 1 and `key` 1, each (B, 3, S, S)."""

    def __init__(self, backbone: nn.Module, config: UnmixMocoConfig, facts: RunFacts) -> None:
        require_roles("unmix_moco", facts.roles, {"query": 1, "key": 1})
        super().__init__(backbone, config, facts)
        self.config = config

    def forward(self, views: Views, step: int) -> Output:
        (query_view,), (key_view,) = views["query"], views["key"]
        mixture = draw_mixture(self.config.mixing, self.seed, step, dist.rank())
        if not self.config.symmetric:
            keys = self.keys(key_view, step)
            loss, logs = self._contrast(self.queries(query_view), *self._mixed(query_view, mixture), keys)
            return Output(loss, {**logs, "queue_filled": self.queue_filled()}, carry=(keys,))
        keys_of_key, keys_of_query = self.keys(key_view, 2 * step), self.keys(query_view, 2 * step + 1)
        query, mixed = self.queries(query_view), self._mixed(query_view, mixture)
        first, logs_1 = self._contrast(query, *mixed, keys_of_key)
        query = self.queries(key_view)
        if self.config.variant == "corrected":
            mixed = self._mixed(key_view, mixture)  # as many forwards as the authors', none of them twice the same
        second, logs_2 = self._contrast(query, *mixed, keys_of_query)
        logs = {name: (logs_1[name] + logs_2[name]) / 2 for name in logs_1}
        return Output(first + second, {**logs, "queue_filled": self.queue_filled()}, carry=(keys_of_query, keys_of_key))

    def chance_level(self) -> float:
        """ln(K + 1) for the query and again for its mixture, in each direction of the loss."""
        return math.log(len(self.queue) + 1) * (4 if self.config.symmetric else 2)

    def _mixed(self, view: Tensor, mixture: Mixture) -> tuple[Tensor, float]:
        """(B, C) unit queries of the mixed batch, and lambda."""
        images, lam = mix(view, mixture)
        return self.queries(images), lam

    def _contrast(self, query: Tensor, mixed: Tensor, lam: float, keys: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        key = dist.own_rows(keys)
        original, logs = info_nce(query, key, self.queue, self.config.temperature)
        mixture = mixture_info_nce(mixed, key, self.queue, lam, self.config.temperature)
        logs |= {"original_loss": original.detach(), "mixture_loss": mixture.detach()}
        return original + mixture, logs


def mixture_info_nce(mixed: Tensor, key: Tensor, negatives: Tensor, lam: float, temperature: float) -> Tensor:
    """lam L(m, k) + (1 - lam) L(m reversed, k), L being InfoNCE, the mean over the batch.

    mixed, key  (B, C) unit rows, row i of `mixed` being of image i with weight lam and of image B - 1 - i with the rest
    negatives   (K, C) unit rows; key and negatives are constants to the caller
    Computed in at least float32. A scalar whose chance level is ln(K + 1).
    """
    dtype = torch.promote_types(mixed.dtype, torch.float32)
    with torch.autocast(mixed.device.type, enabled=False):
        mixed, key, negatives = mixed.to(dtype), key.to(dtype), negatives.to(dtype)
        negative = (mixed @ negatives.T / temperature).logsumexp(1)
        # The reversed mixture against the keys is, row for row, the mixture against the reversed keys.
        own, partners = ((mixed * k).sum(1) / temperature for k in (key, key.flip(0)))
        losses = [(torch.logaddexp(positive, negative) - positive).mean() for positive in (own, partners)]
    return lam * losses[0] + (1.0 - lam) * losses[1]
