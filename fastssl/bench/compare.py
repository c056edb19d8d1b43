"""Two results beside each other: which figures changed by more than the spread of their rounds.

A figure is called faster or slower only where no round of the one lies within the rounds of the other and the medians
differ by more than a tolerance. With three rounds each that happens by chance to one figure in ten when the machine is
steady, and more often when it drifts between the two sittings: so measure what matters in one sitting, both ways.
Quantities that say the same again, such as views/s beside images/s, are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastssl.bench.record import Figure, Record

MORE_IS_BETTER = {"images/s", "steps/s", "MB/s", "x", "share"}
LESS_IS_BETTER = {"ms/image", "ms", "s", "bytes", "MiB", "share waiting"}
_REPEATS = {"views_per_s", "megapixels_per_s", "mb_per_s", "step_s_median", "step_s_p95", "wall_ms_per_image"}
MIN_ROUNDS = 3
SAME, FASTER, SLOWER, FEW = "no difference", "faster", "slower", "few rounds"
_SAME_MACHINE = ("cpu", "cores", "gpu")


@dataclass(frozen=True)
class Comparison:
    """One figure of both results. ratio is new / old, of the medians."""

    name: str
    old: Figure
    new: Figure
    verdict: str

    @property
    def ratio(self) -> float:
        return self.new.median / self.old.median if self.old.median else float("nan")

    @property
    def spread(self) -> float:
        """Half the distance of least and greatest round, as a share of the median: of the result that varies more."""
        return max((f.range[1] - f.range[0]) / 2 / abs(f.median) if f.median else 0.0 for f in (self.old, self.new))


def require_comparable(old: Record, mode: str, machine: Mapping[str, Any]) -> None:
    """Raises ValueError where `old` comes from another machine or measured another thing: such times do not compare."""
    if old.settings.get("mode") != mode:
        raise ValueError(
            f"bench.against holds mode={old.settings.get('mode')}, but this is mode={mode}; give one of the same mode"
        )
    for key in _SAME_MACHINE:
        if old.machine.get(key) != machine.get(key):
            raise ValueError(
                f"bench.against was measured on another machine, whose {key} is {old.machine.get(key)!r} and here"
                f" {machine.get(key)!r}; measure both on one machine"
            )


def differing(old: Record, new: Record) -> list[str]:
    """Settings and versions that differ: what the comparison is between, or what spoils it."""
    return [
        *_differences(old.settings, new.settings, ""),
        *_differences(old.versions, new.versions, ""),
        *_differences({"commit": old.commit}, {"commit": new.commit}, ""),
    ]


def compare(old: Record, new: Record, tolerance: float) -> list[Comparison]:
    """The figures that both have and that have a better end, in the order of `new`."""
    return [
        Comparison(name, old.figures[name], figure, verdict(old.figures[name], figure, tolerance))
        for name, figure in new.figures.items()
        if name in old.figures
        and old.figures[name].unit == figure.unit
        and figure.unit in MORE_IS_BETTER | LESS_IS_BETTER
        and name.rpartition("/")[2] not in _REPEATS
    ]


def verdict(old: Figure, new: Figure, tolerance: float) -> str:
    """faster, slower, or no difference beyond spread and tolerance (a share of `old`; of the whole for shares)."""
    if min(len(old.rounds), len(new.rounds)) < MIN_ROUNDS:
        return FEW
    whole = 1.0 if new.unit.startswith("share") else abs(old.median)
    if abs(new.median - old.median) <= tolerance * whole:
        return SAME
    if new.range[0] > old.range[1]:
        return FASTER if new.unit in MORE_IS_BETTER else SLOWER
    if new.range[1] < old.range[0]:
        return SLOWER if new.unit in MORE_IS_BETTER else FASTER
    return SAME


def _differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """["loader.threads 1 -> 2"]; where files lie and how long was measured do not count."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif old != new and path not in ("config.data.root", "config.run.dir", "seconds"):
        yield f"{path.removeprefix('config.')} {old} -> {new}"
