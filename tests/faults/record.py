"""Marks of the fault suite, and the record of what a run of it saw.

    @pytest.mark.fault("SIGKILL at a random moment of a save", "the newest whole checkpoint is found", exit_code=75)

A test marked so injects that fault and proves that outcome; exit_code is what the user's command ends with, if it ends.
With the fixture `record_property` it may say "seen": "200 of 200 resumed to the same bits". Environment:
FASTSSL_FAULTS=full         injects as often as the project promises; otherwise the few times that every change affords
FASTSSL_RECORD_FAULTS=FILE  adds the outcomes to this JSON file, from which table.py makes docs/reliability.md
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


def times(quick: int, full: int) -> int:
    """How often to inject: `full` under `make faults`, `quick` in the usual suite."""
    return full if is_full() else quick


def is_full() -> bool:
    """Whether this is `make faults`."""
    return os.environ.get("FASTSSL_FAULTS") == "full"


class Recorder:
    """Collects the outcome of each marked test, all of its parameters together; a pytest plugin."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, Any]] = {}
        where = {"commit": _commit(), "date": date.today().isoformat(), "machine": _machine(), "full": is_full()}
        self._where: dict[str, Any] = where

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        if item.get_closest_marker("fault"):
            row = self._rows.setdefault(item.nodeid.partition("[")[0], {"passed": True, "seconds": 0.0, "seen": []})
            row["seconds"] = round(row["seconds"] + report.duration, 2)
            row["passed"] &= report.outcome == "passed"
            if report.when == "call":
                row["seen"] += [str(value) for name, value in report.user_properties if name == "seen"]
            if report.when == "teardown":
                self._save()  # now, or what ends a run of hours would end its record too
        return report

    def _save(self) -> None:
        kept = json.loads(self._path.read_text()) if self._path.is_file() else {}
        kept |= {test: {**row, **self._where} for test, row in self._rows.items()}
        self._path.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")


def _commit() -> str:
    run = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True)
    return run.stdout.strip() or "unknown"


def _machine() -> str:
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {models[0] if models else platform.machine()}"
