"""Un-Mix on SwAV: a mixture of two images belongs to each image's cluster as far as lambda says.

Shen et al., "Un-Mix: rethinking image mixtures for unsupervised visual representation learning", arXiv:2003.05438.
Crops are taken in pairs, and the first of each pair is mixed with the batch in reverse order. SwAV's loss is taken of
the crops as they are, plus of the crops with the mixtures in place of the first ones, where a mixture counts by lambda
in its own order and by 1 - lambda in the reverse order. One draw of blend and lambda serves all ranks and crops, and
one box a pair; images mix with images of their own rank.

`variant: reference` does what the authors' code does, slips included:
- each pair draws its box from the lambda that the pair before left, so that lambda drifts to 1, and the last (small)
  pair's lambda weighs the whole loss;
- the reverse order turns round the first crop's code alone: mixtures of other crops learn reversed codes without being
  reversed, and no mixture ever learns the reversed code of the second crop;
- the queue gets the embeddings of the crops, of the mixture, and of the mixture reversed, all in one step.
`corrected` is the formula that the authors give beside the code: lambda is drawn once and each pair has its own after
rounding; mixtures are reversed wherever they meet an image's code or an image meets theirs; the queue gets the crops'
embeddings only. Departures of both from the authors' code are those of swav.py and mixing.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fastssl.losses import swapped_prediction
from fastssl.methods.base import Output, RunFacts, Views
from fastssl.methods.swav import ASSIGNED, Queue, Swav, SwavConfig
from fastssl.mixing import MixingConfig, draw_mixture, mix

# B images per rank, V views, C embedding width (dim), P prototypes
# crops c0 c1 | c2 c3 | ... in pairs, mixtures m0 | m1 | ... of c0, c2, ...


@dataclass(frozen=True)
class UnmixSwavConfig(SwavConfig):
    """The presets unmix_swav and unmix_swav_cifar hold the published values.

    mixing      how mixtures are drawn
    variant     "reference": the authors' code; "corrected": their formula (see the head of the file)
    """

    name: str = "unmix_swav"
    mixing: MixingConfig = field(default_factory=lambda: MixingConfig(global_p=0.0))
    variant: Literal["reference", "corrected"] = "reference"


class UnmixSwav(Swav):
    """Views: as SwAV, but an even number, the two of a pair of one size."""

    def __init__(self, backbone: nn.Module, config: UnmixSwavConfig, facts: RunFacts) -> None:
        super().__init__(backbone, config, facts)
        if sum(facts.roles.values()) % 2:
            raise ValueError(f"views are {dict(facts.roles)}, but unmix_swav pairs them; make views.local.count even")
        self.mixing, self.variant, self.seed = config.mixing, config.variant, facts.seed

    def forward(self, views: Views, step: int) -> Output:
        crops = [*views["global"], *views.get("local", ())]
        mixtures, lams = self.mixtures(crops, step)
        in_order = [crop for i, m in enumerate(mixtures) for crop in (crops[2 * i], crops[2 * i + 1], m)]
        embeddings = self.embed(in_order)
        sets = list(zip(original_and_mixed(embeddings), original_and_mixed(self.scores(embeddings))))
        losses = self._reference if self.variant == "reference" else self._corrected
        original, mixture, codes, queue = losses(sets, lams, step)
        logs = {"original_loss": original.detach(), "mixture_loss": mixture.detach()}
        return Output(original + mixture, self.logs(embeddings, codes) | logs, carry=queue)

    def chance_level(self) -> float:
        """ln P for the crops and again for the mixtures."""
        return 2 * super().chance_level()

    def mixtures(self, crops: Sequence[Tensor], step: int) -> tuple[list[Tensor], list[float]]:
        """The mixture of each pair's first crop, and its lambda. Raises ValueError if a pair has two sizes."""
        draws = [draw_mixture(self.mixing, self.seed, step * len(crops) // 2 + i) for i in range(len(crops) // 2)]
        lam, mixtures, lams = draws[0].lam, [], []
        for draw, even, odd in zip(draws, crops[::2], crops[1::2]):
            if even.shape != odd.shape:
                raise ValueError(
                    f"views.local has crops of {even.shape[-1]} and {odd.shape[-1]} px in one pair, but unmix_swav "
                    "needs an even count of each size; change count"
                )
            images, own = mix(even, dataclasses.replace(draws[0], lam=lam, centre=draw.centre))
            mixtures.append(images)
            lams.append(own)
            lam = own if self.variant == "reference" else lam
        return mixtures, lams

    def _reference(self, sets: _Sets, lams: Sequence[float], step: int) -> _Losses:
        (originals, scores), (mixed, mixed_scores) = sets
        queue, codes = self.queue_before(step), []
        reversed_first = (first_reversed(mixed), first_reversed(mixed_scores))
        for rows, row_scores in ((originals, scores), (mixed, mixed_scores), reversed_first):
            codes.append(self.codes(row_scores[:ASSIGNED], queue))
            queue = self.pushed(queue, rows[:ASSIGNED], step)
        # The loss is linear in the codes, so that the two orders share one pass over the predictions.
        blended = [lams[-1] * own + (1.0 - lams[-1]) * turned for own, turned in zip(codes[1], codes[2])]
        original, mixture = (
            swapped_prediction(s, c, self.config.temperature) for s, c in ((scores, codes[0]), (mixed_scores, blended))
        )
        return original, mixture, codes[0], queue

    def _corrected(self, sets: _Sets, lams: Sequence[float], step: int) -> _Losses:
        (originals, scores), (_, mixed_scores) = sets
        queue, temperature = self.queue_before(step), self.config.temperature
        codes = self.codes(scores[:ASSIGNED], queue)
        mixed_codes = [*self.codes(mixed_scores[:1], queue), codes[1]]
        original = swapped_prediction(scores, codes, temperature)
        mixture = mixed_prediction(mixed_scores, mixed_codes, lams, temperature)
        return original, mixture, codes, self.pushed(queue, originals[:ASSIGNED], step)


_Sets = list[tuple[Tensor, Tensor]]  # embeddings and scores, of the crops and with mixtures in place
_Losses = tuple[Tensor, Tensor, list[Tensor], Queue]  # of the crops, with mixtures; the crops' codes; the new queue


def original_and_mixed(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(3 V/2, B, ...) of c0 c1 m0 c2 c3 m1 ... -> (V, B, ...) of c0 c1 c2 c3 ... and of m0 c1 m1 c3 ..."""
    first, second, mixture = rows.unflatten(0, (-1, 3)).unbind(1)
    return torch.stack([first, second], 1).flatten(0, 1), torch.stack([mixture, second], 1).flatten(0, 1)


def first_reversed(rows: Tensor) -> Tensor:
    """(V, B, ...) with view 0 in the reverse order of the batch."""
    return torch.cat([rows[:1].flip(1), rows[1:]])


def mixed_prediction(scores: Tensor, codes: Sequence[Tensor], lams: Sequence[float], temperature: float) -> Tensor:
    """SwAV's loss over m0 c1 m1 c3 ..., every mixture counted by its lambda and, reversed, by the rest.

    scores  (V, B, P) with gradient
    codes   (B, P) constants, of m0 and of c1
    lams    of each mixture
    A mixture that meets a mixture, or an image an image, needs no turning: both orders are the same term. A turned
    prediction against a code is the prediction against the turned code.
    """
    log_p = (scores / temperature).log_softmax(2)
    losses = []
    for i, code in enumerate(codes):
        for v in range(len(scores)):
            if v != i:
                lam = 1.0 if v % 2 == i % 2 else lams[v // 2] if i else lams[0]
                losses.append(-((lam * code + (1.0 - lam) * code.flip(0)) * log_p[v]).sum(1).mean())
    return torch.stack(losses).mean()
