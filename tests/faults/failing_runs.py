"""Runs of failing_job.py on two ranks, and what came of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastssl import checkpoint, run_state
from tests.fastssl.runs import settings
from tests.faults.lives import ForkServer, Watch, chain

MONITORED = ("knn.every=6steps", "knn.k=5", "run.duration=14steps")


@dataclass(frozen=True)
class Failed:
    """A job that was given a fault: code of the job, codes of its ranks, seconds from the fault to their ends."""

    folder: Path
    code: int
    codes: dict[int, int]
    seconds: dict[int, float]
    said: str

    @property
    def slowest_s(self) -> float:
        return max(self.seconds.values())

    @property
    def state(self) -> run_state.RunState:
        state = run_state.read(self.folder / "run")
        assert state is not None
        return state

    @property
    def saved(self) -> int:
        """The step of the newest whole checkpoint, or 0; what run_state.json says must be there."""
        newest = checkpoint.newest(self.folder / "run")
        step = int(newest.name.rpartition("-")[2]) if newest else 0
        state = run_state.read(self.folder / "run")
        assert state is None or (state.step, state.checkpoint) == (step, newest and f"checkpoints/{newest.name}")
        return step

    @property
    def done(self) -> int:
        """Steps whose batch rank 0 was handed."""
        lines = chain(self.folder / "chain")
        return lines[-1]["step"] + 1 if lines else 0


def fault(folder: Path, stage: str, kind: str, rank: int = 1, **more: Any) -> dict[str, str]:
    """The environment that makes a rank of a job fail."""
    asked = {"folder": str(folder), "rank": rank, "stage": stage, "kind": kind, **more}
    return {"FASTSSL_TEST_FAULT": json.dumps(asked)}


def run_failing(
    server: ForkServer, shards: Path, folder: Path, stage: str, kind: str, *settings_: str, **more: Any
) -> Failed:
    """Two ranks, of which rank 1 fails, to the end of both."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = settings(shards, folder / "run", *MONITORED, *settings_)
    watch = Watch(chain=str(folder / "chain"))
    life = server.start(
        "tests.faults.failing_job", arguments, watch, ranks=2, environment=fault(folder, stage, kind, **more)
    )
    return collect(folder, life.finish(60), life.out + life.err)


def collect(folder: Path, code: int, said: str) -> Failed:
    at = json.loads((folder / "fault").read_text())
    ends = {int(path.name[-1]): json.loads(path.read_text()) for path in folder.glob("exit-*")}
    return Failed(
        folder, code, {rank: end[0] for rank, end in ends.items()}, {rank: end[1] - at for rank, end in ends.items()},
        said,
    )  # fmt: skip
