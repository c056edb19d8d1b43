"""The SwAV step as it was published, on one process: what `bench.step` holds fastssl's step against.

Caron et al., arXiv:2006.09882, in the form of the authors' program without its mixed precision: float32, NCHW, crops of
one size through the trunk together, Sinkhorn on the transposed scores, the loss view by view, SGD whose gradients are
rescaled tensor by tensor (LARC without clipping), prototypes frozen at first. Collectives of one process are left out.
It shares nothing with fastssl.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ASSIGNED = (0, 1)  # the crops whose codes the others predict


class PublishedSwavStep:
    """`trunk` makes features, `head` embeddings, `prototypes` is a linear layer without bias."""

    def __init__(self, trunk: nn.Module, head: nn.Module, prototypes: nn.Linear, lr: float, frozen_steps: int) -> None:
        self.trunk, self.head, self.prototypes = trunk.train(), head.train(), prototypes
        self.frozen_steps, self.num_steps = frozen_steps, 0
        self.parameters = [*trunk.parameters(), *head.parameters(), *prototypes.parameters()]
        self.optimizer = torch.optim.SGD(self.parameters, lr, momentum=0.9, foreach=False)

    def step(self, crops: list[Tensor]) -> float:
        """The loss of one optimiser step; crops of one size stand together."""
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight.data.clone(), dim=1, p=2))
        sizes = list(dict.fromkeys(crop.shape[-1] for crop in crops))
        features = [self.trunk(torch.cat([crop for crop in crops if crop.shape[-1] == size])) for size in sizes]
        scores = self.prototypes(F.normalize(self.head(torch.cat(features)), dim=1, p=2))
        rows = len(crops[0])
        loss = torch.zeros(())
        for assigned in ASSIGNED:
            with torch.no_grad():
                codes = self._sinkhorn(scores[rows * assigned : rows * (assigned + 1)].detach())
            of_this_code = torch.zeros(())
            for view in range(len(crops)):
                if view != assigned:
                    logits = scores[rows * view : rows * (view + 1)] / 0.1
                    of_this_code = of_this_code - torch.mean(torch.sum(codes * F.log_softmax(logits, dim=1), dim=1))
            loss = loss + of_this_code / (len(crops) - 1)
        loss = loss / len(ASSIGNED)
        self.optimizer.zero_grad()
        loss.backward()
        if self.num_steps < self.frozen_steps:
            self.prototypes.weight.grad = None
        self._rescale_gradients()
        self.optimizer.step()
        self.num_steps += 1
        return loss.item()

    def _sinkhorn(self, scores: Tensor) -> Tensor:
        plan = torch.exp(scores / 0.05).t()
        num_prototypes, rows = plan.shape
        plan /= torch.sum(plan)
        for _ in range(3):
            plan /= torch.sum(plan, dim=1, keepdim=True)
            plan /= num_prototypes
            plan /= torch.sum(plan, dim=0, keepdim=True)
            plan /= rows
        plan *= rows
        return plan.t()

    @torch.no_grad()
    def _rescale_gradients(self, trust: float = 0.001, weight_decay: float = 1e-6) -> None:
        for parameter in self.parameters:
            if parameter.grad is None:
                continue
            norm, gradient_norm = torch.norm(parameter.data), torch.norm(parameter.grad.data)
            if norm != 0 and gradient_norm != 0:
                factor = trust * norm / (gradient_norm + norm * weight_decay + 1e-8)
                parameter.grad.data += weight_decay * parameter.data
                parameter.grad.data *= factor
