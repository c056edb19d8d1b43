"""Losses and signs of health that two or more methods share."""

from __future__ import annotations

import torch
from torch import Tensor

# B images per rank, K negatives, C embedding width


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
