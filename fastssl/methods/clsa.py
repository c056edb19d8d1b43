"""CLSA: strongly augmented views learn the distribution over the keys that a weakly augmented view of the image has.

Wang and Qi, "Contrastive learning with stronger augmentations", arXiv:2104.07713: MoCo v2 on the weak views (with the
keys of the whole batch, not only the query's own, beside the queue) plus distributional divergence minimisation (DDM)
between every weak and every strong view. Departures from the authors' code, besides those in momentum.py:
- DDM takes log_softmax instead of log(softmax), and each view meets the candidates once instead of once per pair;
- views that a preset does not pick are not made;
- `variant: corrected` labels rows by the global rank, where the authors take the number of the GPU in its host and so
  train against other images' keys on several hosts; and it shuffles the second key of the symmetric form itself, where
  the authors undo the first key's shuffle on rows that were never shuffled. `reference` does as they do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.losses import feature_std
from fastssl.methods.base import Output, RunFacts, Views, require_roles
from fastssl.methods.momentum import MomentumConfig, MomentumMethod, unit_rows
from fastssl.settings import require

# B images per rank, W ranks, G = W B, C embedding width (dim), K queue length, V weak and U strong views
# q (B, C) a weak view's queries, s (B, C) a strong view's, n (G + K, C) the candidates: keys of all ranks, then queue


@dataclass(frozen=True)
class ClsaConfig(MomentumConfig):
    """The presets clsa_single, clsa_multi and their symmetric forms hold the published values.

    strong_temperature  of the distributions that DDM compares; `temperature` is that of the contrast
    alpha           weight of DDM
    symmetric       the key image serves as a query too, and the first weak image gives a second set of keys
    variant         "corrected", or "reference": the slips of the authors' code (see the head of the file)
    enqueue         of the symmetric form: "second", the second set of keys as the authors do, or "both"
    normalize_terms     averages the contrasts and the pairs of DDM; as published they are summed, whatever their number
    merge_equal_sizes   views of one size pass the encoder together: fewer, larger forwards. Their batch norm then sees
                        weak and strong views at once, where the authors give each view a forward of its own
    """

    name: str = "clsa"
    strong_temperature: float = 0.2
    alpha: float = 1.0
    symmetric: bool = False
    variant: Literal["reference", "corrected"] = "corrected"
    enqueue: Literal["second", "both"] = "second"
    normalize_terms: bool = False
    merge_equal_sizes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.strong_temperature > 0.0, "method.strong_temperature", self.strong_temperature, "above 0")
        require(self.alpha >= 0.0, "method.alpha", self.alpha, "0 or more")


class Clsa(MomentumMethod):
    """Views: `key` 1, `query` V >= 1 weakly and `strong` U >= 1 strongly augmented, of any sizes."""

    def __init__(self, backbone: nn.Module, config: ClsaConfig, facts: RunFacts) -> None:
        require_roles("clsa", facts.roles, {"key": 1}, query=1, strong=1)
        super().__init__(backbone, config, facts)
        self.config = config
        self.num_weak, self.num_strong = facts.roles["query"], facts.roles["strong"]
        self.num_candidates = facts.clock.batch_size + config.queue_length

    def forward(self, views: Views, step: int) -> Output:
        (key_view,), weak_views, strong_views = views["key"], views["query"], views["strong"]
        if not self.config.symmetric:
            keys = self.keys(key_view, step)
            queries = self._all_queries([*weak_views, *strong_views])
            return self._output([(queries[: self.num_weak], keys)], queries[self.num_weak :], (keys,))
        # The key image comes after the weak ones: the order in which the running statistics of batch norm see them.
        queries = self._all_queries([*weak_views, key_view, *strong_views])
        weak, strong = queries[: self.num_weak + 1], queries[self.num_weak + 1 :]
        keys = self.keys(key_view, 2 * step)
        second = self._second_keys(weak_views[0], step)
        carry = (second,) if self.config.enqueue == "second" else (second, keys)
        return self._output([(weak[:-1], keys), (weak[1:], second)], strong, carry)

    def chance_level(self) -> float:
        """The contrasts at ln(G + K) each, and DDM where weak and strong views have no preference among candidates."""
        contrasts, pairs = self._num_terms()
        if self.config.normalize_terms:
            contrasts, pairs = 1, 1
        return (contrasts + self.config.alpha * pairs) * math.log(self.num_candidates)

    def _num_terms(self) -> tuple[int, int]:
        contrasts = self.num_weak * (2 if self.config.symmetric else 1)
        return contrasts, contrasts * self.num_strong

    def _all_queries(self, views: Sequence[Tensor]) -> list[Tensor]:
        """(B, C) unit queries of each view."""
        if not self.config.merge_equal_sizes:
            return [self.queries(view) for view in views]
        queries: dict[int, Tensor] = {}
        for size in dict.fromkeys(view.shape[2:] for view in views):
            places = [i for i, view in enumerate(views) if view.shape[2:] == size]
            together = self.queries(torch.cat([views[i] for i in places]))
            queries.update(zip(places, together.chunk(len(places))))
        return [queries[i] for i in range(len(views))]

    @torch.no_grad()
    def _second_keys(self, view: Tensor, step: int) -> Tensor:
        """(G, C) keys of the first weak image."""
        if self.config.variant == "corrected" or self.batch_norm not in ("shuffle", "split"):
            return self.keys(view, 2 * step + 1)
        return self.in_order(unit_rows(self.encoder_k(view)), self.shuffle(len(view), 2 * step, view.device))

    def _output(
        self, directions: Sequence[tuple[Sequence[Tensor], Tensor]], strong: Sequence[Tensor], carry: tuple[Tensor, ...]
    ) -> Output:
        """The loss over (weak queries, their keys of all ranks), once or in both directions."""
        config = self.config
        rank = dist.local_rank() if config.variant == "reference" else dist.rank()
        place = rank * len(strong[0])
        terms = [
            contrast_and_match(weak, strong, keys, self.queue, place, config.temperature, config.strong_temperature)
            for weak, keys in directions
        ]
        contrast, match = torch.stack([t[0] for t in terms]).sum(), torch.stack([t[1] for t in terms]).sum()
        if config.normalize_terms:
            contrasts, pairs = self._num_terms()
            contrast, match = contrast / contrasts, match / pairs
        logs = {name: torch.stack([t[2][name] for t in terms]).mean() for name in terms[0][2]}
        logs |= {"contrast_loss": contrast.detach(), "ddm_loss": match.detach(), "queue_filled": self.queue_filled()}
        return Output(contrast + config.alpha * match, logs, carry)


def contrast_and_match(
    weak: Sequence[Tensor],
    strong: Sequence[Tensor],
    keys: Tensor,
    queue: Tensor,
    place: int,
    temperature: float,
    strong_temperature: float,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The contrast summed over weak views, DDM summed over pairs, both means over the batch, and logs.

    weak, strong    (B, C) unit queries of each view
    keys, queue     (G, C) and (K, C) unit rows, constants; rows place..place + B of `keys` are the queries' own
    Computed in at least float32. The logs are scalars without gradient: contrast_top1, the share of weak queries whose
    own key beats all G + K - 1 others; positive_similarity and negative_similarity (of the queue), mean cosines;
    feature_std of the weak queries.

    With p the weak distribution and log_softmax(y) = y - lse(y), DDM is lse(y) - p.y, and y = n s / T is linear in s:
    p.y = s.(p n) / T. So a pair costs a product of C numbers instead of one of G + K, and the weak views' p n add up.
    """
    dtype = torch.promote_types(weak[0].dtype, torch.float32)
    with torch.autocast(weak[0].device.type, enabled=False):
        candidates = torch.cat([keys.to(dtype), queue.to(dtype)])
        own = candidates[place : place + len(weak[0])]
        contrast, match, expected = own.new_zeros(()), own.new_zeros(()), torch.zeros_like(own)
        logs: list[Tensor] = []
        for query in weak:
            query = query.to(dtype)
            logits = (query / temperature) @ candidates.T
            positive = (query * own).sum(1)
            contrast = contrast + (logits.logsumexp(1) - positive / temperature).mean()
            expected += (logits.detach() * (temperature / strong_temperature)).softmax(1) @ candidates
            logs.append(_signs_of_health(query.detach(), logits.detach(), positive.detach(), queue, place))
        for query in strong:
            query = query.to(dtype)
            normalizer = ((query / strong_temperature) @ candidates.T).logsumexp(1)
            match = match + (len(weak) * normalizer - (query * expected).sum(1) / strong_temperature).mean()
    names = ("contrast_top1", "positive_similarity", "negative_similarity", "feature_std")
    return contrast, match, dict(zip(names, torch.stack(logs).mean(0)))


def _signs_of_health(query: Tensor, logits: Tensor, positive: Tensor, queue: Tensor, place: int) -> Tensor:
    targets = torch.arange(place, place + len(query), device=query.device)
    top1 = (logits.argmax(1) == targets).to(query.dtype).mean()
    negative = query.mean(0) @ queue.mean(0).to(query.dtype)
    return torch.stack([top1, positive.mean(), negative, feature_std(query)])
