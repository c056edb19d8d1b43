"""What a method is to the loop: a module with three hooks around the optimiser step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

Views = Mapping[str, Sequence[Tensor]]


@dataclass
class Output:
    """loss: scalar to differentiate. logs: scalars without gradient. carry: for the same method's `after_step` only."""

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    carry: Any = None


class Method(nn.Module):
    """A self-supervised method. It knows views, ranks through `dist`, and nothing of files, devices or DDP."""

    #: names of buffers that every rank computes alike, which DDP must not broadcast
    rank_equal_buffers: ClassVar[tuple[str, ...]] = ()

    def forward(self, views: Views, step: int) -> Output:
        """Float views (B, 3, S, S) by role, and the global step, to a loss."""
        raise NotImplementedError

    def backbone(self) -> nn.Module:
        """The encoder that evaluation and export take."""
        raise NotImplementedError

    def chance_level(self) -> float | None:
        """The loss of features that know nothing, for the log; None if the method has no such level."""
        return None

    def before_step(self, step: int) -> None:
        """Before the forward."""

    def after_backward(self, step: int) -> None:
        """After the backward, before the optimiser: the place to drop gradients."""

    def after_step(self, output: Output) -> None:
        """After the optimiser: the place to move queues."""


def require_roles(method: str, got: Mapping[str, int], want: Mapping[str, int]) -> None:
    """ValueError unless the configured views are those that the method reads: role -> count."""
    if dict(got) != dict(want):
        raise ValueError(
            f"views are {dict(got)}, but method {method} reads {dict(want)}; write views.ROLE for exactly these"
        )
