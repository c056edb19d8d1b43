"""A training job one of whose ranks fails on command: FASTSSL_TEST_FAULT says where and how, as JSON.

folder  where each rank writes pid-RANK, and exit-RANK: its exit code and when; the failing one `fault`: when
rank    which one fails
stage   start | loop | save | evaluation | teardown
kind    ValueError | RuntimeError | sleep | block (in C, where no Python handler runs) | stop | kill | signal
step    for stage loop, the steps before it
number  for kind signal
to      for kind signal: self | twice (to itself, as a scheduler and an agent do) | peer (rank 0, which then waits in
        a collective) | agent
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

CAUSE = "the cause of it all"


def main(arguments: list[str]) -> int:
    from fastssl import train

    fault = json.loads(os.environ["FASTSSL_TEST_FAULT"])
    folder, leave = Path(fault["folder"]), os._exit
    (folder / f"pid-{_rank()}").write_text(str(os.getpid()))

    def noted(code: int) -> Any:
        _note_end(folder, code)
        leave(code)

    os._exit = noted  # type: ignore[assignment]
    if fault.pop("rank") == _rank():
        _arm(**fault)
    code = train.main(arguments)
    _note_end(folder, code)
    return code


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _note_end(folder: Path, code: int) -> None:
    (folder / f"exit-{_rank()}").write_text(json.dumps([code, time.monotonic()]))


def _arm(folder: str, stage: str, step: int = 5, **fault: Any) -> None:
    _patch(stage, step, lambda: _fail(Path(folder), **fault))


def _patch(stage: str, step: int, fail: Any) -> None:
    import fastssl.checkpoint
    import fastssl.evaluate.monitor
    from fastssl.log import RunLog
    from fastssl.training import Training

    owner, name = {
        "start": (Training, "build"),
        "loop": (Training, "step"),
        "save": (fastssl.checkpoint, "write_tensors"),
        "evaluation": (fastssl.evaluate.monitor, "features_of"),
        "teardown": (RunLog, "close"),
    }[stage]
    real, count = getattr(owner, name), 0

    def failing(*arguments: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == (step + 1 if stage == "loop" else 1):
            fail()
        return real(*arguments, **more)

    setattr(owner, name, failing)


def _fail(folder: Path, kind: str, number: int = 0, to: str = "self") -> None:
    (folder / "fault").write_text(json.dumps(time.monotonic()))
    if kind == "sleep":
        time.sleep(3600)
    elif kind == "block":
        mutex = ctypes.create_string_buffer(64)
        for _ in range(2):  # a signal ends a sleep in C, and not this
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    elif kind == "signal":
        target = {"peer": folder / "pid-0", "agent": None}.get(to, Path())
        pid = os.getppid() if target is None else int(target.read_text()) if target.name else os.getpid()
        for _ in range(2 if to == "twice" else 1):
            os.kill(pid, number)
            time.sleep(0.05)
        time.sleep(1.0 if to == "peer" else 0.0)
    elif kind in ("stop", "kill"):
        os.kill(os.getpid(), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
        time.sleep(0.1)
    else:
        raise {"ValueError": ValueError, "RuntimeError": RuntimeError}[kind](CAUSE)
