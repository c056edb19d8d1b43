"""Find the loader settings for this machine and method by measuring: successive halving over a small grid.

All candidates are measured for a short time, the better half for twice as long, and so on; the last four are measured
in interleaved rounds. Where the rounds of several overlap with those of the best, the one with the fewest threads and
the least prefetch wins: what does not help should not take cores and memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastssl.bench.rates import Part, Rig
from fastssl.bench.record import Figure
from fastssl.settings import Config, LoaderConfig
from pipelines.backends import BACKENDS, make
from pipelines.loader import available_cores

_FINALISTS = 4
_PREFETCH = (2, 4)


@dataclass(frozen=True)
class Candidate:
    backend: str
    threads: int
    prefetch: int

    @property
    def name(self) -> str:
        return f"{self.backend}/threads_{self.threads}/prefetch_{self.prefetch}"

    def within(self, cfg: Config) -> Config:
        return dataclasses.replace(cfg, loader=dataclasses.replace(cfg.loader, **dataclasses.asdict(self)))


@dataclass(frozen=True)
class Choice:
    """best, and images/s of the finalists, once a round; `tried` counts all candidates."""

    best: Candidate
    objective: Part
    finalists: dict[Candidate, Figure]
    tried: int


def candidates(cfg: Config, bands: int, device: torch.device) -> list[Candidate]:
    """The grid; what the run says explicitly is not varied."""
    given: LoaderConfig = cfg.loader
    cores = available_cores()
    backends = [given.backend] if given.backend != "auto" else _backends_here(cfg, bands, device)
    threads = [given.threads] if given.threads else sorted({max(1, cores // 2), cores, 2 * cores})
    prefetch = [given.prefetch] if given.prefetch else _PREFETCH
    return [Candidate(*values) for values in itertools.product(backends, threads, prefetch)]


def tune(
    cfg: Config,
    device: torch.device,
    rig: Rig,
    objective: str,
    seconds: float,
    rounds: int,
    say: Callable[[str], None] = lambda line: None,
) -> Choice:
    """The settings with which the run makes most images/s, in about `seconds` plus warm-up steps.

    objective   "train": loader and step together, which compete for the cores of a CPU; "loader": views alone; "auto":
                train where the time suffices for a step of each candidate
    Raises what loaders and methods raise, ValueError where no backend can be used.
    """
    bands = cfg.data.manifest().bands
    left = candidates(cfg, bands, device)
    tried, part = len(left), _objective(objective, rig, len(left), seconds, say)
    halvings = max(0, (len(left) - 1).bit_length() - _FINALISTS.bit_length() + 1)
    share_s = seconds / (halvings + 2)  # the final rounds get twice the time of a halving
    for _ in range(halvings):
        rates = {one: rig.measure(part, share_s / len(left), one.within(cfg)).images_per_s for one in left}
        left = sorted(left, key=rates.__getitem__, reverse=True)[: max(_FINALISTS, len(left) // 2)]
        say(f"best of {len(rates)}: {left[0].name}, {rates[left[0]]:.0f} images/s")
    measured: dict[Candidate, list[float]] = {one: [] for one in left}
    for _ in range(rounds):
        for one in left:
            slice_s = 2 * share_s / rounds / len(left)
            measured[one].append(rig.measure(part, slice_s, one.within(cfg)).images_per_s)
    finalists = {one: Figure("images/s", tuple(rates)) for one, rates in measured.items()}
    return Choice(pick(finalists), part, finalists, tried)


def pick(finalists: dict[Candidate, Figure]) -> Candidate:
    """The best median or, of those whose rounds overlap with its rounds, the one that takes least."""
    best = max(finalists.values(), key=lambda figure: figure.median)
    as_good = [one for one, figure in finalists.items() if figure.range[1] >= best.range[0]]
    return min(as_good, key=lambda one: (one.threads, one.prefetch, -finalists[one].median))


def _objective(wanted: str, rig: Rig, num: int, seconds: float, say: Callable[[str], None]) -> Part:
    if wanted != "auto":
        return "loader" if wanted == "loader" else "train"
    step_s = rig.measure("step", 0.0).step_s_median
    if 2 * num * step_s <= seconds:
        return "train"
    say(
        f"a step takes {step_s:.1f} s, too long to train with each of {num} candidates in {seconds:.0f} s, so the"
        " loader alone decides; give bench.seconds more, or bench.objective=train"
    )
    return "loader"


def _backends_here(cfg: Config, bands: int, device: torch.device) -> Sequence[str]:
    """Those that can be built for these views on this machine."""
    reasons = {name: _why_not(name, cfg, bands, device) for name in BACKENDS}
    usable = [name for name, reason in reasons.items() if not reason]
    if not usable:
        raise ValueError(f"no backend can make these views: {'; '.join(reasons.values())}")
    return usable


def _why_not(name: str, cfg: Config, bands: int, device: torch.device) -> str:
    """What keeps backend `name` from being built; "" if nothing does."""
    try:
        make(name, cfg.view_specs(), 1, device=str(device), threads=1, output="uint8", depth=1, bands=bands).close()
    except ValueError as error:  # not installed, or not for such data
        return str(error)
    return ""
