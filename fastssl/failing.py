"""Failing together: of several ranks the first that fails says why, once, and all the others leave without a word."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch.distributed as td

from fastssl import dist
from fastssl.config import ConfigError
from fastssl.stopping import StoppedEarly
from pipelines.backends import DecodeError
from shard_tools import exit_codes
from shard_tools.printing import sentence

CONNECT_S = 5.0
MAIN_FIRST_S = 1.0  # what all ranks find alike, a wrong setting say, is rank 0's to tell
LAST_WORDS_S = 2.0  # for a rank whose connections broke to have said why
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)


@dataclass(frozen=True)
class Notice:
    """What ended the first rank that failed: its exit code, and the cause in a sentence."""

    rank: int
    code: int
    reason: str

    def code_for(self, rank: int) -> int:
        """The exit code of `rank`: a request and a hang concern all alike."""
        alike = (exit_codes.STOPPED, exit_codes.HANG, exit_codes.INTERRUPTED)
        return self.code if rank == self.rank or self.code in alike else exit_codes.PEER_FAILED


class Ended(BaseException):
    """This rank leaves with `code`; what was to be said has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Board:
    """A place in the store of the ranks where the first that fails leaves its notice; threads may share it.

    A rank that has seen the notice asks for nothing more: the one that has the store may end from then on, and torch
    tells the user at length of a connection that breaks while it is in use.
    """

    def __init__(self, store: td.Store) -> None:
        self._store = store
        self._notice: Notice | None = None
        self._gone = False
        self._lock = threading.Lock()

    @classmethod
    def open(cls, timeout_s: float = CONNECT_S) -> Board | None:
        """None on one process, or if the store does not answer."""
        store = dist.connect(timeout_s) if dist.announced()[1] > 1 else None
        return cls(store) if store is not None else None

    def read(self) -> Notice | None:
        """The notice, if there is one. Raises RuntimeError, here and below, if the store is gone."""
        with self._open():
            if self._notice is None and self._store.check(["notice"]):
                self._see(self._store.get("notice"))
            return self._notice

    def put(self, notice: Notice) -> Notice:
        """The notice that stands: this one, or the one that was there before."""
        with self._open():
            if self._notice is None:
                self._see(self._store.compare_set("notice", "", json.dumps(dataclasses.asdict(notice))))
            assert self._notice is not None
            return self._notice

    def wait(self, seconds: float) -> Notice | None:
        """The notice as soon as there is one."""
        until = time.monotonic() + seconds
        while (notice := self.read()) is None and time.monotonic() < until:
            time.sleep(0.05)
        return notice

    def post(self, key: str, value: str) -> None:
        """Anything else that other ranks should see, until there is a notice."""
        with self._open():
            if self._notice is None:
                self._store.set(key, value)

    def posted(self, key: str) -> str | None:
        with self._open():
            found = self._notice is None and self._store.check([key])
            return self._store.get(key).decode() if found else None

    def linger(self) -> None:
        """Before the end, if the store ends with this process: wait until all ranks have seen the notice."""
        self._wait_for_all("seen")

    def close(self) -> None:
        """At the end of a run in which nobody failed: as `linger`, until all ranks have come here."""
        with contextlib.suppress(RuntimeError), self._open():
            self._store.add("closed", 1)
        self._wait_for_all("closed")

    def _wait_for_all(self, counter: str) -> None:
        until = time.monotonic() + LAST_WORDS_S
        with contextlib.suppress(RuntimeError):
            while dist.hosts_store() and time.monotonic() < until:
                with self._open():
                    if self._store.add(counter, 0) >= dist.announced()[1]:
                        return
                time.sleep(0.02)

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """torch tells the user of each attempt to reach a store that is gone, at length: one is enough."""
        if not self._lock.acquire(timeout=LAST_WORDS_S):  # another thread waits for a host that is stopped
            raise RuntimeError("the store does not answer")
        try:
            if self._gone:
                raise RuntimeError("the store is gone")
            yield
        except RuntimeError:
            self._gone = True
            raise
        finally:
            self._lock.release()

    def _see(self, notice: bytes) -> None:
        self._notice = Notice(**json.loads(notice))
        self._store.add("seen", 1)  # from here on the store may go away with its host


def tell(error: BaseException, board: Board | None) -> Notice:
    """Say what ended this rank, unless another rank has said what ended all. Returns the notice that stands.

    One that says the same as this rank would counts as its own.
    """
    rank, _ = dist.announced()
    code, text = explain(error)
    own = Notice(rank, code, text.strip().splitlines()[-1])
    patience = LAST_WORDS_S if _is_lost_peer(error) else MAIN_FIRST_S if rank else 0.0
    try:
        stands = (board.wait(patience) or board.put(own)) if board else own
        speaks = stands == own
    except RuntimeError:  # the store is gone, and with it whoever could settle who speaks: one a host
        stands, speaks = own, int(os.environ.get("LOCAL_RANK", "0")) == 0 or rank == 1
    if board is None and rank and isinstance(error, ConfigError):
        speaks = False  # a wrong command is wrong on rank 0 too
    if speaks:
        say(own.code, text)
    return own if (own.code, own.reason) == (stands.code, stands.reason) else stands


def explain(error: BaseException) -> tuple[int, str]:
    """An error's exit code, and what to print: a sentence if a user can mend it, a traceback if not."""
    if isinstance(error, StoppedEarly):
        return error.exit_code, "stopped before the first step, nothing is lost; the same command goes on from there"
    if isinstance(error, KeyboardInterrupt):
        return exit_codes.INTERRUPTED, "interrupted"
    if isinstance(error, ValueError | DecodeError):  # both carry what a user can mend
        return exit_codes.code_of(error), str(error)
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        code = exit_codes.DISK_FULL if full else exit_codes.code_of(error)
        return code, f"{error.strerror or error}{where}; what was complete before is kept"
    if isinstance(error, FloatingPointError):
        return exit_codes.NOT_FINITE, str(error)
    if _is_lost_peer(error):
        first = re.sub(r"^\[\S+\] ", "", (str(error) or type(error).__name__).splitlines()[0])
        return exit_codes.PEER_FAILED, (
            f"another rank was lost without a word, killed (by want of memory?) or with its host ({first}); the same"
            " command goes on from the last checkpoint"
        )
    return exit_codes.BUG, "".join(traceback.format_exception(error))


def say(code: int, text: str) -> None:
    """One write, so that no other rank's words come in between."""
    rank, _ = dist.announced()
    if code == exit_codes.BUG:
        text = (f"rank {rank} failed:\n" if dist.announced()[1] > 1 else "") + text.rstrip()
    elif code not in (exit_codes.STOPPED, exit_codes.INTERRUPTED):
        text = f"error{f' on rank {rank}' if rank else ''}: {sentence(text)}"
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def end(error: BaseException) -> int:
    """What a command does with what ended it: says so, and returns the exit code. With several ranks it never returns.

    A group that has failed is not taken down: that waits for what will never come.
    """
    if isinstance(error, SystemExit):
        raise error
    _, world = dist.announced()
    if world == 1:
        code, text = explain(error)
        if code == exit_codes.BUG:
            raise error
        say(code, text)
        return code
    if isinstance(error, Ended):
        leave(error.code)
    board = Board.open()
    notice = tell(error, board)
    if board:
        board.linger()
    leave(notice.code_for(dist.announced()[0]))


def leave(code: int) -> NoReturn:
    """End the process now, from any thread."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _is_lost_peer(error: BaseException) -> bool:
    """Whether this rank fails because of another one."""
    if dist.announced()[1] == 1:
        return False
    if isinstance(error, td.DistError) or getattr(error, "exit_code", None) == exit_codes.PEER_FAILED:
        return True
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))
