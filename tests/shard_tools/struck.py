"""Packs in forked processes that have everything imported, and that may end themselves at a chosen call."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import sys
from multiprocessing.context import ForkServerProcess

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["shard_tools.cli", __name__])


def start(words: list[str], *strike: object) -> ForkServerProcess:
    """`shard_tools WORDS`. strike: function to watch, number of its call, before or after, and SIGKILL or SIGSTOP."""
    process = FORKS.Process(target=_main, args=(words, *strike))
    process.start()
    return process


def _main(words: list[str], watched: str = "", number: int = 0, when: str = "", what: str = "SIGKILL") -> None:
    from shard_tools import cli

    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if watched:
        watch(watched, number, when, getattr(signal, what))
    sys.exit(cli.main(words))


def watch(watched: str, number: int, when: str, what: signal.Signals) -> None:
    """Send this process the signal `what` at that call of the function."""
    module, _, name = watched.rpartition(".")
    original, calls = getattr(importlib.import_module(module), name), 0

    def counted(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        mine = calls == number
        if mine and when == "before":
            os.kill(os.getpid(), what)
        result = original(*args, **kwargs)
        if mine and when == "after":
            os.kill(os.getpid(), what)
        return result

    setattr(importlib.import_module(module), name, counted)
