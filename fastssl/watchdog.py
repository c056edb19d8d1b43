"""Threads beside the loop that see what the loop cannot: a rank that fails, one that stands still, a lost agent.

One thread (`_watch`) never waits for anything but a pipe, into which Python writes the number of each signal also while
the main thread is inside C++. The other (`_ask`) talks to the store of the ranks, which may not answer. They end the
process by themselves if the main thread does not: a collective whose peer is gone may wait for long.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import os
import select
import signal
import sys
import tempfile
import threading
import time
import types
from collections.abc import Iterator

from fastssl import dist
from fastssl.failing import LAST_WORDS_S, Board, Ended, Notice, explain, leave, say, tell
from fastssl.run_state import StateKeeper
from fastssl.stopping import StoppedEarly, StopRequest
from pipelines.loader import Batch
from shard_tools import exit_codes

TICK_S = 0.5
GRACE_S = 4.0  # for the main thread to come out by itself, once it is known that the run is over
EARLY_GRACE_S = 2.0  # the same before the first step, where nothing has to be saved
SAME_REQUEST_S = 1.0  # Slurm and torchrun's agent both hand a signal on: within this time two are one
REPORTS_S = 1.5  # for the other ranks to say where they stand
WITNESSES = 8  # ranks that ask all others where they stand: of a thousand ranks not all a thousand times
BEFORE_FIRST_STEP = 3  # times run.timeout_s, and at least _LEAST_BEFORE_S: reading an index, compiling
_LEAST_BEFORE_S = 600.0


class Watchdog:
    """Watches one rank of a run: a context around all of it, within which signals are `stop`'s.

    `timeout_s` without a `beat` is a hang: every rank prints the stacks of its threads and leaves with exit_codes.HANG,
    and one says which rank stood still. 0 turns this off. Time in which this thread could not run either (a stopped
    job, a sleeping laptop) does not count.
    """

    def __init__(self, timeout_s: float, state: StateKeeper, stop: StopRequest) -> None:
        self._timeout_s, self._state, self._stop = timeout_s, state, stop
        self._at = "starting"
        self._beats = 0
        self._begun = self._failed = False
        self._board: Board | None = None
        self._notice: Notice | None = None
        self._stalled = threading.Event()
        self._reported = threading.Event()
        self._closing = threading.Event()
        self._main = threading.main_thread().ident or 0
        self._agent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def __enter__(self) -> Watchdog:
        self._read, self._write = os.pipe()
        for descriptor in (self._read, self._write):
            os.set_blocking(descriptor, False)
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._watcher = threading.Thread(target=self._watch, name="fastssl-watchdog", daemon=True)
        self._watcher.start()
        self._asker: threading.Thread | None = None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        ended = self._ended(error)
        self._closing.set()
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._write, b"\0")
        self._watcher.join()
        if self._asker:
            self._asker.join(GRACE_S)
        os.close(self._read)
        os.close(self._write)
        if self._board:
            self._board.close() if ended is None else self._board.linger()
        if ended is not None and ended is not error:
            raise ended from error

    def connect(self) -> None:
        """Once the ranks have met: look for notices of the others."""
        self._board = Board.open()
        if self._board:
            self._asker = threading.Thread(target=self._ask, name="fastssl-board", daemon=True)
            self._asker.start()

    def limit_s(self) -> float:
        """How long the main thread may take from one beat to the next."""
        if self._begun:
            return self._timeout_s
        return max(BEFORE_FIRST_STEP * self._timeout_s, _LEAST_BEFORE_S)

    def beat(self, at: str) -> None:
        """Progress: the main thread comes to `at`, such as "step 7"."""
        self._at = at
        self._beats += 1

    def over(self, batches: Iterator[Batch], start: int) -> Iterator[Batch]:
        """`batches`, of the steps from `start`, with a beat before and after each."""
        for step in itertools.count(start):
            self.beat(f"the batch of step {step}")
            batch = next(batches)
            self.beat(f"step {step}")
            yield batch

    def step_done(self) -> None:
        """From the first one on, timeout_s counts as it is."""
        self._beats += 1
        self._begun = True

    @contextlib.contextmanager
    def announcing(self) -> Iterator[None]:
        """Tell the others at once of an error inside, before what is around it is taken down."""
        try:
            yield
        except BaseException as error:
            ended = self._ended(error)
            if ended is None or ended is error:
                raise
            raise ended from error

    def _ended(self, error: BaseException | None) -> Ended | None:
        """What to raise instead of an error of one of several ranks, after it was told; None on one process."""
        if error is None or isinstance(error, Ended):
            return error
        if dist.announced()[1] == 1:
            code, text = explain(error)
            self._state.end(code, _last_line(text))
            return None
        self._failed = True
        self._close_in(tell(error, self._board))
        return Ended(self._code())

    def _close_in(self, notice: Notice) -> None:
        if self._notice is None:
            self._since_notice = time.monotonic()
            self._notice = notice  # last, for the other threads look at it
            prefix = f"rank {notice.rank}: " if notice.rank else ""
            self._state.end(notice.code, prefix + notice.reason)

    def _code(self) -> int:
        assert self._notice is not None
        return self._notice.code_for(dist.announced()[0])

    # The thread that waits for nobody.

    def _watch(self) -> None:
        first: dict[int, float] = {}  # when each kind of signal came first
        beats, stood_s, last = -1, 0.0, time.monotonic()
        while not self._closing.is_set():
            select.select([self._read], [], [], TICK_S)
            now = time.monotonic()
            for number in self._signals():
                if now - first.setdefault(number, now) > SAME_REQUEST_S:
                    leave(128 + number)
            if self._agent is not None and os.getppid() != self._agent:
                self._agent = None
                self._stop.ask()
            early = first and not (self._stop.begun or self._failed)
            if early and now - min(first.values()) > EARLY_GRACE_S:
                self._leave_early()
            if self._notice and now - self._since_notice > GRACE_S and not self._closing.is_set():
                leave(self._code())
            stood_s = stood_s + min(now - last, 2 * TICK_S) if beats == self._beats else 0.0
            beats, last = self._beats, now
            if self._stalled.is_set() or (self._timeout_s and stood_s > self.limit_s()):
                self._hang()

    def _signals(self) -> Iterator[int]:
        with contextlib.suppress(BlockingIOError):
            yield from (number for number in os.read(self._read, 4096) if number in self._stop.SIGNALS)

    def _leave_early(self) -> None:
        """The main thread is inside C++, waiting for other ranks perhaps, and nothing has to be saved."""
        self._closing.set()
        self._close_in(tell(StoppedEarly("asked to stop"), self._board))
        leave(self._code())

    def _hang(self) -> None:
        """Print all stacks, learn from the others who stands where, and leave."""
        print_stacks()
        self._stalled.set()
        if not self._reported.wait(REPORTS_S + LAST_WORDS_S + TICK_S if self._asker and self._asker.is_alive() else 0):
            self._say_hang(f"rank {dist.announced()[0]} stands at {self._at} {_frame(self._main)[0]}")
        leave(exit_codes.HANG)

    def _say_hang(self, who: str) -> None:
        reason = f"no progress for {self.limit_s():g} s (run.timeout_s): {who}"
        own = stands = Notice(dist.announced()[0], exit_codes.HANG, reason)
        with contextlib.suppress(RuntimeError):
            stands = self._board.put(own) if self._board else own
        if stands == own:
            advice = "the stacks of all threads are above; the same command goes on from the last checkpoint"
            say(exit_codes.HANG, f"{reason}; {advice}")
        self._close_in(stands)

    # The thread that talks to the store.

    def _ask(self) -> None:
        assert self._board is not None
        with contextlib.suppress(RuntimeError):  # the store is gone; the others' connections will tell
            while not (self._closing.is_set() or self._failed):
                if self._stalled.wait(TICK_S):
                    self._report(self._board)
                    return
                if self._board.posted("hang"):
                    self._stalled.set()
                elif notice := self._board.read():
                    self._close_in(notice)
                    return

    def _report(self, board: Board) -> None:
        """Post where this rank stands, read where the others do, and say who is to blame unless another has said so."""
        rank, world = dist.announced()
        frame, waits = _frame(self._main)
        board.post(f"at/{rank}", json.dumps({"at": self._at, "frame": frame, "waits": waits}))
        board.post("hang", "")
        until = time.monotonic() + REPORTS_S
        found: dict[int, str] = {}
        while rank < WITNESSES and len(found) < world and time.monotonic() < until:
            time.sleep(0.05)
            found |= {r: text for r in range(world) if r not in found and (text := board.posted(f"at/{r}"))}
        if rank >= WITNESSES:
            board.wait(REPORTS_S + TICK_S)
        self._say_hang(_who(found, world) if found else f"rank {rank} stands at {self._at} {frame}")
        board.linger()
        self._reported.set()


def print_stacks() -> None:
    """The stacks of all threads, in one write, so that those of several ranks do not mix."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        sys.stderr.write(f"stacks of rank {dist.announced()[0]} (process {os.getpid()}):\n{file.read()}")
        sys.stderr.flush()


def _who(found: dict[int, str], world: int) -> str:
    """Which rank stands still, from what the ranks that answered posted."""
    silent = [r for r in range(world) if r not in found]
    if silent:
        return f"{_ranks(silent)} did not answer, stopped or with a host that is gone"
    places = {rank: json.loads(text) for rank, text in found.items()}
    busy = [rank for rank, place in places.items() if not place["waits"]]
    where = "; ".join(f"rank {rank} stands at {places[rank]['at']} {places[rank]['frame']}" for rank in busy[:3])
    return where if busy else f"all ranks wait for each other, rank 0 at {places[0]['at']} {places[0]['frame']}"


def _ranks(ranks: list[int]) -> str:
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {', '.join(map(str, ranks))}"


def _frame(thread: int) -> tuple[str, bool]:
    """Where a thread is, and whether that is a place to wait for other ranks."""
    frame: types.FrameType | None = sys._current_frames().get(thread)
    if frame is None:
        return "", False
    path, name = frame.f_code.co_filename, frame.f_code.co_name
    waits = "torch/distributed/" in path or path.endswith("torch/autograd/graph.py") or path == dist.__file__
    return f"in {name} ({path}:{frame.f_lineno})", waits


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]
