"""Where the true class stands among the scores: the one definition of top-1 and top-5 that all evaluators share."""

from __future__ import annotations

import torch
from torch import Tensor

NOWHERE = 2**31  # beyond any top-k, also where there are fewer than k classes


def place_of(scores: Tensor, truth: Tensor) -> Tensor:
    """How many classes come before the true one: scores (..., C), truth (...) -> (...). Top-5 is `place < 5`.

    A class comes before another with a larger score, or with an equal score and a lower number, so the answer never
    hangs on how a sort treats ties. If the true class's own score is not a number, its place is NOWHERE: a diverged
    probe gets no hits.
    """
    own = scores.gather(-1, truth.unsqueeze(-1))
    lower_number = torch.arange(scores.shape[-1], device=scores.device) < truth.unsqueeze(-1)
    before = ((scores > own) | ((scores == own) & lower_number)).sum(-1)
    return torch.where(own.squeeze(-1).isnan(), NOWHERE, before)
