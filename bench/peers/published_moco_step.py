"""The MoCo step as it was published, on one process: what `bench.step` holds fastssl's step against.

He et al., arXiv:1911.05722, in the form of the authors' program: float32, NCHW, torchvision's ResNet with the MLP head
of v2 as `fc`, the key encoder moved parameter by parameter, the key batch shuffled and put back, a queue (C, K) that is
cloned, logits concatenated for a cross-entropy, SGD without foreach. The collectives of one process are left out.
It shares nothing with fastssl.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PublishedMocoStep:
    """`encoder` ends in `fc`, which makes (B, C) embeddings; `queue` is (C, K) with unit columns."""

    def __init__(
        self, encoder: nn.Module, queue: Tensor, momentum: float, temperature: float, lr: float, weight_decay: float
    ) -> None:
        self.encoder_q, self.encoder_k = encoder.train(), copy.deepcopy(encoder).train()
        for parameter in self.encoder_k.parameters():
            parameter.requires_grad = False
        self.queue, self.place = queue.clone(), 0
        self.momentum, self.temperature = momentum, temperature
        self.optimizer = torch.optim.SGD(encoder.parameters(), lr, 0.9, weight_decay=weight_decay, foreach=False)

    def step(self, query_view: Tensor, key_view: Tensor) -> float:
        """The loss of one optimiser step."""
        queries = F.normalize(self.encoder_q(query_view), dim=1)
        with torch.no_grad():
            for key_weight, query_weight in zip(self.encoder_k.parameters(), self.encoder_q.parameters()):
                key_weight.data = key_weight.data * self.momentum + query_weight.data * (1.0 - self.momentum)
            order = torch.randperm(len(key_view))
            keys = F.normalize(self.encoder_k(key_view[order]), dim=1)[torch.argsort(order)]
        positive = torch.einsum("nc,nc->n", queries, keys).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", queries, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1)
        logits /= self.temperature
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        self.queue[:, self.place : self.place + len(keys)] = keys.T
        self.place = (self.place + len(keys)) % self.queue.shape[1]
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
