"""Runs commands of ours, each in a forked process of its own, and measures what each took.

A line of JSON in, such as {"module": "shard_tools.cli", "arguments": ["info", "DIR"], "folder": CWD, "seconds": 20}; a
line out, as `Outcome` has it. What the commands import is imported once, before, so that a trial costs milliseconds and
what it takes is the input's doing. A trial may take no more than _GUARD_BYTES of address space beyond the start, so
that a bomb which is not refused does not take the machine with it.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

REPOSITORY = Path(__file__).parents[2]
_GUARD_BYTES = 2 * 2**30
# What a room's commands import, at once or late. The packer's processes are small, and quickly forked.
_IMPORTED = {
    "shard_tools": ("shard_tools.cli", "shard_tools.cache", "h5py", "astropy.io.fits", "concurrent.futures.process"),
    "fastssl": (
        "fastssl.train",
        "fastssl.evaluate.main",
        "fastssl.export",
        "fastssl.detection.train",
        "fastssl.bench.main",
        "fastssl.show_views",
        "hydra",
        "safetensors.torch",
        "fastssl.evaluate.knn",
        "shard_tools.cache",
        "timm",
        "torch.utils.tensorboard",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """code: the exit code, or minus the signal; memory: the peak above the start, in bytes; cpu_s: of all threads."""

    code: int
    out: str
    err: str
    memory: int
    cpu_s: float
    wall_s: float


class Trials:
    """The processes in which trials run, one a room; a context manager."""

    def __init__(self) -> None:
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Trials:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            process.communicate(timeout=30)

    def _process(self, room: str) -> subprocess.Popen[str]:
        if room not in self._processes:
            environment = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(REPOSITORY),
                "PYTHONWARNINGS": "ignore",
            }
            self._processes[room] = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.trial", room],
                cwd=REPOSITORY,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        return self._processes[room]

    def run(
        self,
        module: str,
        arguments: Sequence[str],
        folder: Path,
        seconds: float,
        environment: Mapping[str, str] | None = None,
    ) -> Outcome:
        """What `MODULE.main(arguments)` does with `folder` as its working directory."""
        process = self._process("shard_tools" if module.startswith("shard_tools") else "fastssl")
        assert process.stdin is not None
        assert process.stdout is not None
        task = {
            "module": module,
            "arguments": list(arguments),
            "folder": str(folder),
            "seconds": seconds,
            "environment": dict(environment or {}),
        }
        process.stdin.write(json.dumps(task) + "\n")
        process.stdin.flush()
        return Outcome(**json.loads(process.stdout.readline()))


def _serve(room: str) -> None:
    for name in _IMPORTED[room]:
        importlib.import_module(name)
    gc.freeze()  # or a trial that makes many objects would be charged for looking through all modules
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(asdict(_try(json.loads(line)))) + "\n")
        answers.flush()


def _try(task: dict[str, Any]) -> Outcome:
    files = [os.memfd_create(name) for name in ("out", "err")]
    before, began = _resident(), time.monotonic()
    child = os.fork()
    if not child:
        _become(task, files)
    while not (done := os.wait4(child, os.WNOHANG))[0]:
        if time.monotonic() - began > task["seconds"]:
            os.killpg(child, signal.SIGKILL)
            done = os.wait4(child, 0)
            break
        time.sleep(0.002)
    _, status, used = done
    out, err = (os.pread(file, 2**20, 0).decode("utf-8", "backslashreplace") for file in files)
    for file in files:
        os.close(file)
    code = os.waitstatus_to_exitcode(status)
    taken = used.ru_maxrss * 1024 - before
    return Outcome(code, out, err, taken, used.ru_utime + used.ru_stime, time.monotonic() - began)


def _become(task: dict[str, Any], files: list[int]) -> None:
    """In the new process: the command, to its end."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, file in zip((1, 2), files):
            os.dup2(file, descriptor)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        limit = _address_space() + _GUARD_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        os.chdir(task["folder"])
        os.environ.update(task["environment"])
        sys.argv = [task["module"], *task["arguments"]]
        code = importlib.import_module(task["module"]).main(list(task["arguments"])) or 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    _serve(sys.argv[1])
