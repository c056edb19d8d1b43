"""Losses and signs of health that two or more methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl import dist

# B images per rank, W ranks, C embedding width, K negatives (MoCo) | P prototypes, V views (SwAV)


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE against one positive and K shared negatives (MoCo, eq. 1), the mean over the batch, and its logs.

    query, key  (B, C) unit rows; key and negatives are constants to the caller
    negatives   (K, C) unit rows
    Computed in at least float32. The loss is a scalar whose chance level is ln(K + 1). The logs are scalars without
    gradient: contrast_top1, the share of queries whose positive beats all negatives; positive_similarity and
    negative_similarity, mean cosines; feature_std of the queries.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, key, negatives = query.to(dtype), key.to(dtype), negatives.to(dtype)
        positive = (query * key).sum(1) / temperature
        negative = query @ negatives.T / temperature
        # log(e^positive + sum e^negative) - positive, without the (B, K + 1) copy that concatenating them would make
        loss = (torch.logaddexp(positive, negative.logsumexp(1)) - positive).mean()
        with torch.no_grad():
            logs = {
                "contrast_top1": (positive > negative.amax(1)).to(dtype).mean(),
                "positive_similarity": positive.mean() * temperature,
                "negative_similarity": query.mean(0) @ negatives.mean(0),
                "feature_std": feature_std(query),
            }
    return loss, logs


@torch.no_grad()
def feature_std(unit_rows: Tensor) -> Tensor:
    """Standard deviation over the batch of unit rows (B, C), averaged over C and times sqrt(C).

    1 where the features spread over the whole sphere, 0 where all images have the same (Chen and He, arXiv:2011.10566,
    figure 2, there without the factor).
    """
    return unit_rows.detach().std(0, correction=0).mean() * unit_rows.shape[1] ** 0.5


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int, hard: bool = False) -> Tensor:
    """Codes (B, P): the transport plan nearest to `scores` that uses all prototypes equally (SwAV, eq. 3-5).

    scores      (B, P) cosines z.c of this rank's rows; equal B on all ranks, whose W * B rows are balanced together
    epsilon     weight of the entropy; with cosines and 0.025 or more nothing underflows in float32
    iterations  1 or more, each prototypes first and rows last
    hard        the row's largest entry becomes 1 and the others 0
    Rows sum to 1; in exact arithmetic a constant added to all scores changes nothing, which is why the largest score
    is subtracted first (e^20 overflows float16). Computed in at least float32. The authors' constants P and W * B
    cancel and are left out.
    """
    with torch.autocast(scores.device.type, enabled=False):
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        codes = ((scores - dist.all_reduce_max(scores.max())) / epsilon).exp()
        for _ in range(iterations):
            codes /= dist.all_reduce_sum(codes.sum(0))
            codes /= codes.sum(1, keepdim=True)
    return torch.zeros_like(codes).scatter_(1, codes.argmax(1, keepdim=True), 1.0) if hard else codes


def swapped_prediction(scores: Tensor, codes: Sequence[Tensor], temperature: float) -> Tensor:
    """SwAV's loss (eq. 1, 2 and 6): every view predicts the code of each of the first views but its own.

    scores  (V, B, P) cosines with gradient
    codes   (B, P) constants, of views 0, 1, ...
    The mean over codes, over the V - 1 other views and over the batch; ln P for a network that knows nothing.
    """
    log_p = (scores / temperature).log_softmax(2)
    summed = log_p.sum(0)
    losses = [-(code * (summed - log_p[i])).sum(1).mean() / (len(scores) - 1) for i, code in enumerate(codes)]
    return torch.stack(losses).mean()


@torch.no_grad()
def usage_entropy(codes: Tensor) -> Tensor:
    """Entropy of the mean code of (..., P) rows divided by ln P: 1 if all prototypes are used equally, 0 if one is."""
    usage = codes.flatten(0, -2).mean(0)
    return torch.special.entr(usage).sum() / math.log(len(usage))
