"""Signs that a run learns nothing, watched in what every method logs; one sentence each, with the known remedies.

The signs come from what users of these methods reported: SwAV's loss stuck at ln(prototypes) (8.006 for 3,000), few
prototypes in use, MoCo's loss at ln(queue + 1), features that are the same for all images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

PATIENCE_STEPS = 1000  # the first hundreds of steps look bad in healthy runs: queues fill, warm-ups start from nothing


@dataclass(frozen=True)
class Sign:
    """`bad(means, chance)` over PATIENCE_STEPS in a row is worth the sentence `says`, in which {value} is filled in."""

    value: str
    bad: Callable[[float, float | None], bool]
    says: str


SIGNS = (
    Sign(
        "feature_std",
        lambda value, _: value < 0.1,
        "features of different images are nearly the same (feature_std {value:.3f}, where 1 is spread out and 0 is "
        "collapsed); lower optim.lr, add optim.warmup, and look at the views with fastssl-views: are they images?",
    ),
    Sign(
        "prototype_entropy",
        lambda value, _: value < 0.5,
        "few prototypes are in use (entropy {value:.2f} of 1); lower method.epsilon to 0.03, freeze the prototypes for "
        "longer, or take fewer of them (about ten per expected class)",
    ),
    Sign(
        "loss",
        lambda value, chance: chance is not None and value > 0.995 * chance,
        "the loss stays at {value:.3f}, which is chance level; lower optim.lr, make the views easier (larger "
        "views.*.scale), for SwAV lower method.epsilon to 0.03 or freeze the prototypes for longer, for MoCo and CLSA "
        "raise method.temperature or take a shorter queue",
    ),
    Sign(
        "negative_similarity",
        lambda value, _: value > 0.9,
        "queries are as near to the keys of other images as to anything (mean cosine {value:.2f}); lower optim.lr, "
        "raise method.momentum towards 0.999, and check that the queue is shorter than the data set",
    ),
)


class HealthWatch:
    """chance: the method's `chance_level()`. Says each sign once in a process."""

    def __init__(self, chance: float | None) -> None:
        self._chance = chance
        self._bad_since: dict[str, int] = {}
        self._said: set[str] = set()

    def look(self, step: int, means: Mapping[str, float]) -> list[str]:
        """Sentences for signs that were bad in every look of the last PATIENCE_STEPS; means are those of a log line."""
        sentences = []
        for sign in SIGNS:
            value = means.get(sign.value)
            if value is None or sign.value in self._said:
                continue
            if not sign.bad(value, self._chance):
                self._bad_since.pop(sign.value, None)
                continue
            since = self._bad_since.setdefault(sign.value, step)
            if step - since >= PATIENCE_STEPS:
                self._said.add(sign.value)
                sentences.append(f"for {step - since} steps, {sign.says.format(value=value)}")
        return sentences
