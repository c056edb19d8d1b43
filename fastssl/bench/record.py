"""What a measurement leaves behind: a JSON file with every round of every figure and the conditions it was taken under.

Docs and README take their figures from such files in `bench/results/`, never from a keyboard. Figures are named by
paths, such as "moco_v2/native/images_per_s". What is compared is measured in the same rounds, and a ratio is a figure
of its own: one number a round, so that a slow minute of the machine slows both of its parts.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from shard_tools.documents import read_json

FORMAT = "fastssl-bench"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 2**20  # the largest in bench/results has 46 kB
MAX_ROUNDS = 1000
PACKAGES = (
    "fastssl-train", "torch", "torchvision", "numpy", "pillow", "nvidia-dali-cuda130", "nvidia-dali-cuda120"
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One quantity, measured once a round; `unit` such as "images/s", "ms/image", "x" (a ratio), "bytes"."""

    unit: str
    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def range(self) -> tuple[float, float]:
        """The spread: least and greatest of the rounds."""
        return min(self.rounds), max(self.rounds)


@dataclass(frozen=True)
class Record:
    """Figures and their conditions.

    what        one line: what was measured
    command     that repeats it
    settings    all that was chosen: data set, batch, seconds, threads, ...
    versions    package -> version; of a peer in an environment of its own, "peer/package" -> version
    note        one sentence drawn from the figures, such as what limits the run; may be empty
    """

    what: str
    command: str
    figures: Mapping[str, Figure]
    settings: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=lambda: versions())
    machine: Mapping[str, Any] = field(default_factory=lambda: machine())
    commit: str = field(default_factory=lambda: commit())
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    note: str = ""

    def save(self, path: Path) -> None:
        document = {"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        document["figures"] = {
            name: {"unit": figure.unit, "median": figure.median, "rounds": list(figure.rounds)}
            for name, figure in self.figures.items()
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Raises ValueError where `path` is no record of this version."""
        try:
            document = read_json(path, MAX_FILE_BYTES)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a result of fastssl-bench ({error})") from None
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            raise ValueError(f"{path} is no result of fastssl-bench; give a file that bench.json or `make bench` wrote")
        if (version := document.pop("version", None)) != FORMAT_VERSION:
            raise ValueError(f"{path} is a result of version {version!r}, this reads {FORMAT_VERSION}; measure again")
        try:
            figures = {name: _figure(f) for name, f in document.pop("figures").items()}
            for key, kind in _KINDS.items():
                if key in document and not isinstance(document[key], kind):
                    raise TypeError(f"its {key} is of another kind")
            return cls(figures=figures, **document)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no whole result of fastssl-bench ({error}); measure again") from None


_KINDS = {
    "what": str, "command": str, "settings": dict, "versions": dict, "machine": dict, "commit": str, "date": str,
    "note": str,
}  # fmt: skip


def _figure(document: Any) -> Figure:
    """Raises TypeError or KeyError for what is none."""
    unit, rounds = document["unit"], document["rounds"]
    if not isinstance(unit, str) or not isinstance(rounds, list) or not 1 <= len(rounds) <= MAX_ROUNDS:
        raise TypeError(f"a figure is no unit with 1 to {MAX_ROUNDS} rounds")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in rounds):
        raise TypeError("a round is no number")
    return Figure(unit, tuple(rounds))


def machine() -> dict[str, Any]:
    """The hardware and the system, without a host's name."""
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """package -> version, of those that are installed."""
    installed = {found.name.lower(): found.version for found in metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


def commit() -> str:
    """The commit of the source that runs, with "+" where its tree was changed; "" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float | None:
    if sys.platform == "win32":
        return None
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
