"""One clock: every duration becomes steps at once, and the learning rate is a function of the step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from fastssl.settings import OptimConfig

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(k|M)?(ep|steps?|images)")
_FACTOR = {None: 1, "k": 1_000, "M": 1_000_000}


@dataclass(frozen=True)
class Clock:
    """steps_per_epoch full global batches; batch_size images a step over all ranks."""

    steps_per_epoch: int
    batch_size: int

    def steps(self, text: str, key: str) -> int:
        """Steps of a duration such as "200ep", "0.5ep", "5000steps", "10Mimages", rounded up. Raises ValueError."""
        match = _DURATION.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"{key} is {text!r}, but must be a duration such as 200ep, 5000steps or 10Mimages")
        amount = float(match[1]) * _FACTOR[match[2]]
        per_unit = {"ep": self.steps_per_epoch, "images": 1 / self.batch_size}.get(match[3], 1)
        return math.ceil(amount * per_unit - 1e-9)

    def every(self, text: str, key: str) -> int:
        """Period in steps, or 0 for "never". Raises ValueError for a period of no steps."""
        if text == "never":
            return 0
        period = self.steps(text, key)
        if period == 0:
            raise ValueError(f"{key} is {text!r}, which is no step at all; write never, or a longer duration")
        return period


def learning_rate(config: OptimConfig, clock: Clock, total_steps: int) -> Callable[[int], float]:
    """lr(step) for 0 <= step < total_steps, scaled by the batch if asked for. Raises ValueError naming a bad duration.

    cosine: final + (lr - final) (1 + cos(pi t / T)) / 2 with t counted from the end of the warm-up; with schedule_per
    "epoch", t is the step at which the epoch began. The first epoch of MoCo's 200 runs at lr, the last at lr * 6e-5.
    """
    peak = config.lr * (clock.batch_size / 256 if config.lr_scaling == "linear" else 1.0)
    warmup = clock.steps(config.warmup, "optim.warmup")
    milestones = [clock.steps(m, f"optim.milestones[{i}]") for i, m in enumerate(config.milestones)]
    if warmup >= total_steps > 0:
        raise ValueError(
            f"optim.warmup is {config.warmup!r}, but must be shorter than run.duration ({total_steps} steps)"
        )

    def lr(step: int) -> float:
        if step < warmup:
            return config.warmup_lr + (peak - config.warmup_lr) * (step / (warmup - 1) if warmup > 1 else 1.0)
        if config.schedule_per == "epoch":
            step = max(step // clock.steps_per_epoch * clock.steps_per_epoch, warmup)
        if config.schedule == "cosine":
            progress = (step - warmup) / (total_steps - warmup)
            return config.final_lr + (peak - config.final_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
        if config.schedule == "step":
            return peak * config.gamma ** sum(step >= milestone for milestone in milestones)
        return peak

    return lr
