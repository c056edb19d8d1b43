"""What a method is to the loop: a module with three hooks around the optimiser step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from fastssl.schedule import Clock

Views = Mapping[str, Sequence[Tensor]]


@dataclass
class Output:
    """loss: scalar to differentiate. logs: scalars without gradient. carry: for the same method's `after_step` only."""

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    carry: Any = None


@dataclass(frozen=True)
class RunFacts:
    """What a method may know of the run it is built for.

    roles   view role -> number of views
    seed    of everything random in the method
    clock   steps per epoch and global batch, for settings that are durations
    """

    roles: Mapping[str, int]
    seed: int = 0
    clock: Clock = field(default_factory=lambda: Clock(steps_per_epoch=1, batch_size=1))


class Method(nn.Module):
    """A self-supervised method. It knows views, ranks through `dist`, and nothing of files, devices or DDP."""

    #: names of buffers that DDP must leave alone: every rank computes them alike, or they are meant to differ by rank
    own_buffers: ClassVar[tuple[str, ...]] = ()

    def forward(self, views: Views, step: int) -> Output:
        """Float views (B, 3, S, S) by role, and the global step, to a loss."""
        raise NotImplementedError

    def backbone(self) -> nn.Module:
        """The encoder that evaluation and export take."""
        raise NotImplementedError

    def encoders(self) -> list[nn.Module]:
        """The modules that images pass through, each a function of its input alone: what `run.compile` compiles."""
        return [self.backbone()]

    def chance_level(self) -> float | None:
        """The loss of features that know nothing, for the log; None if the method has no such level."""
        return None

    def advice(self) -> list[str]:
        """Sentences for the start of the log: settings that are likely not to do what was meant."""
        return []

    def rank_state(self) -> dict[str, Tensor]:
        """What differs by rank and has to be saved by each; such buffers are not persistent."""
        return {}

    def load_rank_states(self, states: Sequence[Mapping[str, Tensor]]) -> str | None:
        """At a resume: take this rank's part of what `rank_state` gave on every rank of the life before, in rank order.

        There may have been another number of ranks. Returns a sentence for the log if something is lost by that.
        """
        return None

    def moved_before_step(self) -> list[Tensor]:
        """Parameters with gradients that `before_step` changes, so that a rejected step can be taken back."""
        return []

    def before_step(self, step: int) -> None:
        """Before the forward."""

    def after_backward(self, step: int) -> None:
        """After the backward, before the optimiser: the place to drop gradients."""

    def after_step(self, output: Output) -> None:
        """After the optimiser: the place to move queues, in place: a rejected step puts buffers back."""


def require_roles(method: str, got: Mapping[str, int], want: Mapping[str, int], **at_will: int) -> None:
    """ValueError unless the configured views are those that the method reads: role -> count.

    at_will     role -> least count of roles that may have more views; 0 if the role may be missing
    """
    least = {role: count for role, count in at_will.items() if got.get(role, 0) >= count}
    rest = {role: count for role, count in got.items() if role not in least}
    if rest != dict(want) or len(least) < len(at_will):
        reads = ", ".join(
            [*(f"{n} {role}" for role, n in want.items()), *(f"{n} or more {r}" for r, n in at_will.items())]
        )
        raise ValueError(
            f"views are {dict(got)}, but method {method} reads {reads}; write views.ROLE for exactly these"
        )
