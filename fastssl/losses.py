"""Losses of two or more methods."""

from __future__ import annotations

import torch
from torch import Tensor

# B images per rank, K negatives, C embedding width


def info_nce(query: Tensor, key: Tensor, negatives: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """InfoNCE against one positive and K shared negatives (MoCo, eq. 1), the mean over the batch, and its accuracy.

    query, key  (B, C) unit rows; key and negatives are constants to the caller
    negatives   (K, C) unit rows
    Computed in at least float32. Returns the loss and the share of queries whose positive beats all negatives, both
    scalars. Chance level of the loss is ln(K + 1).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, key, negatives = query.to(dtype), key.to(dtype), negatives.to(dtype)
        positive = (query * key).sum(1) / temperature
        negative = query @ negatives.T / temperature
        # log(e^positive + sum e^negative) - positive, without the (B, K + 1) copy that concatenating them would make
        loss = (torch.logaddexp(positive, negative.logsumexp(1)) - positive).mean()
        accuracy = (positive.detach() > negative.detach().amax(1)).to(dtype).mean()
    return loss, accuracy
