"""run_state.json: what a run has reached, how it ended, and what its scheduler should do next.

    state       running | stopped | done | failed
    action      requeue: start the same command again | none: nothing is left to do | mend: a human first, see `reason`
    step, of    steps that are saved, and steps of the whole run
    checkpoint  where they are saved, from run.dir: "checkpoints/step-00000040"; null before the first save
    exit_code   of the rank that ended the run; null while it runs
    reason      one sentence; "" while it runs
    starts      how many starts in a row, this one among them, found the run at the step where the one before found it
    host, pid, time     of rank 0 when it wrote this, in UTC

Rank 0 replaces the file at the start, after each save and at the end, so that it never names a checkpoint that is not
there. A run that is killed leaves "running" with action requeue: if no job runs any more, that is what to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastssl import dist, run_lock
from shard_tools import disk, exit_codes

FILE = "run_state.json"
REQUEUE = {exit_codes.STOPPED, exit_codes.HANG, exit_codes.PEER_FAILED, exit_codes.INTERRUPTED}


@dataclass
class RunState:
    """The content of the file; see the head of this module."""

    state: Literal["running", "stopped", "done", "failed"]
    action: Literal["requeue", "none", "mend"]
    step: int
    of: int
    checkpoint: str | None
    exit_code: int | None = None
    reason: str = ""
    starts: int = 1
    host: str = ""
    pid: int = 0
    time: str = ""


def read(run_dir: Path) -> RunState | None:
    """What the run says of itself; None if it never began, or if the file is not one of these."""
    try:
        values: dict[str, Any] = json.loads((run_dir / FILE).read_text())
        return RunState(**{f.name: values[f.name] for f in dataclasses.fields(RunState)})
    except (OSError, ValueError, KeyError, TypeError):
        return None


class StateKeeper:
    """Keeps the file of one run in `run_dir`; on ranks other than 0 it does nothing. Threads may call it.

    Before `begin` nothing is created: a start that fails at once leaves an empty place empty, and where there was a run
    the failure is added to what it had reached.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._now: RunState | None = None
        self._ours = self._ended = False
        self._lock = threading.RLock()

    def take(self) -> None:
        """The run is this job's alone, from here on."""
        self._ours = True

    def begin(self, step: int, of: int) -> None:
        """The run starts, or goes on, from `step`. Raises OSError."""
        before = read(self._run_dir)
        again = before is not None and before.step == step and before.state in ("running", "failed")
        starts = before.starts + 1 if before is not None and again else 1
        self._put(RunState("running", "requeue", step, of, _checkpoint(step), starts=starts))

    def saved(self, step: int) -> None:
        """The checkpoint of `step` is on disk. Raises OSError."""
        with self._lock:  # another thread may have said that the run is over
            assert self._now is not None
            self._put(dataclasses.replace(self._now, step=step, checkpoint=_checkpoint(step), starts=1))

    def end(self, exit_code: int, reason: str = "") -> None:
        """How the run ended; the first call counts. A full disk leaves the file as it was."""
        with self._lock:
            now = self._now or self._left_behind()
            if now is not None and not self._ended:
                self._ended = True
                self._put_end(now, exit_code, reason)

    def _put_end(self, now: RunState, exit_code: int, reason: str) -> None:
        state: Literal["stopped", "done", "failed"]
        action: Literal["requeue", "none", "mend"]
        if exit_code == exit_codes.DONE:
            state, action = "done" if now.step >= now.of else "stopped", "none"
        else:
            state = "stopped" if exit_code in (exit_codes.STOPPED, exit_codes.INTERRUPTED) else "failed"
            action = "requeue" if exit_code in REQUEUE else "mend"
        with contextlib.suppress(OSError):
            self._put(dataclasses.replace(now, state=state, action=action, exit_code=exit_code, reason=reason))

    def _left_behind(self) -> RunState | None:
        """What an earlier job left that may go on, if none works on it now."""
        before = read(self._run_dir)
        free = self._ours or run_lock.is_free(self._run_dir)
        return before if before is not None and before.state != "done" and free else None

    def _put(self, state: RunState) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self._now = dataclasses.replace(state, host=socket.gethostname(), pid=os.getpid(), time=now)
        if dist.announced()[0] == 0:
            text = json.dumps(dataclasses.asdict(self._now), indent=1) + "\n"
            disk.write_file(self._run_dir / FILE, text.encode())


def _checkpoint(step: int) -> str | None:
    return f"checkpoints/step-{step:08d}" if step else None
