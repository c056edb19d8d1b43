"""Jobs that can be killed: fork-server children in a session of their own, torchrun jobs, and what they leave.

    with ForkServer() as server:
        life = server.start("fastssl.train", settings, Watch(chain="runs/a"))     # 0.1 s instead of 5 s of imports
        life.kill()                             # SIGKILL to all of its processes at once
    life = start_torchrun("fastssl.train", settings, ranks=2)

A job is `main(arguments)` of a module. The server has imported what jobs need and has made no thread, no tensor and no
random number, so that its forked children are what a fresh process is. For Linux: /proc says which processes there are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
PRELOADED = ("torch", "torch.distributed", "torch.utils.tensorboard", "hydra", "omegaconf", "fastssl.train",
             "fastssl.evaluate.monitor", "fastssl.config", "pipelines.backends.native",
             "pipelines.backends.stamps")  # fmt: skip
_MARK = "FASTSSL_TEST_LIFE"  # in the environment of every process of a torchrun job
_WATCH = "FASTSSL_TEST_WATCH"


@dataclasses.dataclass(frozen=True)
class Watch:
    """What a job does besides its work.

    chain   folder: each rank appends to rank-R.jsonl what it is handed as each batch (see `chain`)
    die     "PLACE:N" kills the whole job, or "PLACE:N@R" only when rank R comes there. Places: "batch", when step N is
            handed its batch; "fsync", in the N-th fsync of a process; "rename", before its N-th rename of a file;
            "emptied", when the file of name N was emptied to be written anew
    """

    chain: str = ""
    die: str = ""


class Life:
    """A started job."""

    def __init__(self, pid: int, out: Path, err: Path) -> None:
        self.pid, self._out, self._err = pid, out, err

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    def wait(self, timeout_s: float = 120) -> int | None:
        """The exit code, minus the signal's number if one ended it; None if it still runs after `timeout_s`."""
        raise NotImplementedError

    def processes(self) -> list[int]:
        """The job's processes that run, its children and grandchildren included."""
        raise NotImplementedError

    def kill(self) -> None:
        """SIGKILL to all processes of the job, and waits until they are gone."""
        while processes := self.processes():
            for pid in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.wait(1)
        self.wait()  # the last ones may have gone between a look at them and the wait

    def finish(self, timeout_s: float = 120) -> int:
        """The exit code; a job that takes longer is killed and fails the test."""
        code = self.wait(timeout_s)
        if code is None:
            self.kill()
            raise AssertionError(f"the job did not end within {timeout_s} s: {self.err[-2000:]}")
        return code


class ForkServer:
    """A process that has everything imported, and forks a child for each job. One user at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.lives"], cwd=REPOSITORY, env=environment, stdin=pipe, stdout=pipe
        )
        try:
            assert self._ask(None) == 1, "the fork server has more threads than its own"
        except BaseException:
            self.close()
            raise

    def start(
        self,
        module: str,
        arguments: Sequence[str],
        watch: Watch | None = None,
        *,
        ranks: int = 1,
        environment: dict[str, str] | None = None,
    ) -> Life:
        """`main(arguments)` of `module`; with several ranks, in as many processes that find each other as under
        torchrun, but without an agent."""
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        watch = watch or Watch()
        pid = self._ask({
            "module": module, "arguments": list(arguments), "watch": dataclasses.asdict(watch), "ranks": ranks,
            "out": str(out), "err": str(err), "environment": environment or {}, "port": free_port(),
        })  # fmt: skip
        return _Forked(self, pid, out, err)

    def close(self) -> None:
        """Ends the server and whatever job still runs."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, what: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the fork server has ended"
        return json.loads(answer)


class _Forked(Life):
    def __init__(self, server: ForkServer, pid: int, out: Path, err: Path) -> None:
        super().__init__(pid, out, err)
        self._server = server
        self._code: int | None = None

    def wait(self, timeout_s: float = 120) -> int | None:
        if self._code is None:
            self._code = self._server._ask({"wait": self.pid, "timeout_s": timeout_s})
        return self._code

    def processes(self) -> list[int]:
        return [pid for pid, session in _sessions() if session == self.pid]

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; a zombie that waits for the server
            os.killpg(self.pid, signal.SIGKILL)
        super().kill()


class _Torchrun(Life):
    def __init__(self, process: subprocess.Popen[bytes], mark: str, out: Path, err: Path) -> None:
        super().__init__(process.pid, out, err)
        self._process, self._mark = process, mark

    def wait(self, timeout_s: float = 120) -> int | None:
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def processes(self) -> list[int]:
        """The agent first: it must not start anything after the others are gone."""
        return marked(self._mark)

    @property
    def workers(self) -> list[int]:
        """The processes of the ranks, in their order."""
        ranks = {pid: _environment(pid).get("RANK") for pid in self.processes()}
        return sorted((pid for pid, rank in ranks.items() if rank is not None), key=lambda pid: int(ranks[pid] or 0))


def start_torchrun(
    module: str,
    arguments: Sequence[str],
    watch: Watch | None = None,
    *,
    ranks: int = 2,
    folder: Path,
    more: Sequence[str] = (),
    environment: dict[str, str] | None = None,
) -> _Torchrun:
    """`main(arguments)` of `module` under torchrun; `more` are options of torchrun. `folder` gets the output."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    out, err = folder / f"{mark[:8]}.out", folder / f"{mark[:8]}.err"
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += [*(more or ["--standalone"]), "-m", "tests.faults.lives", module, *arguments]
    watched = json.dumps(dataclasses.asdict(watch or Watch()))
    given = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", _MARK: mark, _WATCH: watched, **(environment or {})}
    with out.open("wb") as a, err.open("wb") as b:
        process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **given}, stdout=a, stderr=b)
    return _Torchrun(process, mark, out, err)


def marked(mark: str) -> list[int]:
    """Processes that were started with this mark, a process before its children."""
    return [pid for pid in _processes() if _environment(pid).get(_MARK) == mark]


def chain(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What a rank was handed in the order of its lives: step; ids; samples, a sha256 of the views and label of each."""
    path = folder / f"rank-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def until(condition: Callable[..., Any], *arguments: Any, timeout_s: float = 180) -> None:
    """Return when `condition(*arguments)` is true; torchrun takes its time on a busy machine."""
    end = time.monotonic() + timeout_s
    while not condition(*arguments):
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _processes() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit())


def _sessions() -> Iterator[tuple[int, int]]:
    """(process, session) of all processes but zombies."""
    for pid in _processes():
        with contextlib.suppress(OSError):
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if state != "Z":
                yield pid, int(fields[2])


def _environment(pid: int) -> dict[str, str]:
    """As the process was started with; empty for zombies and those of other users."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    return dict(entry.decode(errors="replace").split("=", 1) for entry in entries if b"=" in entry)


def _serve() -> dict[str, Any]:
    """Fork a child for each line of stdin until it ends. Returns in the children, with what they were asked for."""
    for name in PRELOADED:
        importlib.import_module(name)
    from fastssl import config

    config.load(["data.root=none", "run.dir=none"])  # what Hydra reads once
    gc.collect()
    gc.freeze()
    alive: set[int] = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if asked is None:
            answer: int | None = len(os.listdir("/proc/self/task"))
        elif "wait" in asked:
            answer = _wait(asked["wait"], asked["timeout_s"])
            alive -= {asked["wait"]} if answer is not None else set()
        else:
            ready, tell = os.pipe()
            answer = os.fork()
            if answer == 0:
                os.setsid()
                os.close(tell)
                return asked
            os.close(tell)
            os.read(ready, 1)
            os.close(ready)
            alive.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in alive:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
    sys.exit(0)


def _wait(pid: int, timeout_s: float) -> int | None:
    until = time.monotonic() + timeout_s
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= until:
            return None
        time.sleep(0.002)


def _become(asked: dict[str, Any]) -> None:
    """In a forked child: its own files and environment; with several ranks, returns in each of them."""
    for descriptor, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, asked["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, asked["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(asked["environment"])
    if asked["ranks"] == 1:
        return
    shared = {"WORLD_SIZE": asked["ranks"], "LOCAL_WORLD_SIZE": asked["ranks"], "MASTER_PORT": asked["port"]}
    ranks = []
    for rank in range(asked["ranks"]):
        pid = os.fork()
        if pid == 0:
            own = {**shared, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({name: str(value) for name, value in own.items()})
            return
        ranks.append(pid)
    os._exit(_watch_over(ranks))


def _watch_over(ranks: list[int]) -> int:
    """The first exit code of a rank that is not 0; the others then have 20 s."""
    left, worst, until = set(ranks), 0, float("inf")
    while left:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            left.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and not worst:
                worst, until = code if code > 0 else 128 - code, time.monotonic() + 20
        elif time.monotonic() > until:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        else:
            time.sleep(0.005)
    return worst


def _run(module: str, arguments: Sequence[str], watch: Watch) -> int:
    """The job itself, watched."""
    if watch.chain:
        _record_batches(Path(watch.chain))
    if watch.die:
        _die_at(watch.die)
    sys.argv = [module, *arguments]
    return int(importlib.import_module(module).main(list(arguments)) or 0)


def _record_batches(folder: Path) -> None:
    from pipelines.loader import Batch, Loader

    folder.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", "0"))
    file = os.open(folder / f"rank-{rank}.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    real = Loader.batches

    def batches(self: Loader, start_step: int = 0) -> Iterator[Batch]:
        for batch in real(self, start_step):
            line = {"step": batch.step, "ids": batch.ids.tolist(), "samples": _hashes(batch)}
            os.write(file, (json.dumps(line) + "\n").encode())
            yield batch

    Loader.batches = batches  # type: ignore[method-assign]


def _hashes(batch: Any) -> list[str]:
    views = [view.contiguous().numpy() for views in batch.views.values() for view in views]
    hashes = []
    for i, label in enumerate(batch.labels.tolist()):
        digest = hashlib.sha256(str(label).encode())
        for view in views:
            digest.update(view[i].tobytes())
        hashes.append(digest.hexdigest())
    return hashes


def _die_at(point: str) -> None:
    place, _, number = point.partition(":")
    number, _, rank = number.partition("@")
    if rank and os.environ.get("RANK", "0") != rank:
        return
    seen = 0

    def die() -> None:
        os.killpg(os.getpgrp(), signal.SIGKILL)
        time.sleep(60)  # a signal to oneself may come a moment later

    def come_by() -> None:
        nonlocal seen
        seen += 1
        if seen == int(number):
            die()

    if place == "batch":
        from pipelines.loader import Batch, Loader

        real = Loader.batches

        def batches(self: Loader, start_step: int = 0) -> Iterator[Batch]:
            for batch in real(self, start_step):
                if batch.step == int(number):
                    die()
                yield batch

        Loader.batches = batches  # type: ignore[method-assign]
        return
    if place == "emptied":
        write_text = Path.write_text

        def emptied(path: Path, *arguments: Any, **more: Any) -> int:
            if path.name == number:
                path.open("w").close()
                die()
            return write_text(path, *arguments, **more)

        Path.write_text = emptied  # type: ignore[method-assign, assignment]
        return
    names = {"fsync": ("fsync",), "rename": ("rename", "replace")}[place]
    for name in names:
        call = getattr(os, name)

        def counted(*arguments: Any, call: Any = call, **more: Any) -> Any:
            come_by()
            return call(*arguments, **more)

        setattr(os, name, counted)


def _main() -> int:
    if len(sys.argv) > 1:  # a rank of torchrun
        return _run(sys.argv[1], sys.argv[2:], Watch(**json.loads(os.environ[_WATCH])))
    asked = _serve()
    _become(asked)
    return _run(asked["module"], asked["arguments"], Watch(**asked["watch"]))


if __name__ == "__main__":
    sys.exit(_main())
