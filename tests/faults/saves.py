"""Jobs for a fork server that do little but save, and one that limits a command's files; `main(arguments)`."""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl import checkpoint, dist

WIDTH = 40_000  # 160 kB of weights, twice with the optimiser's
CALLS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")


def main(arguments: list[str]) -> int:
    """`[kind, ...]`: the function of that name, with the other arguments."""
    kind, *rest = arguments
    return int({"save": save, "limit": limit}[kind](*rest) or 0)


def save(run_dir: str, steps: str, keep: str = "2", die: str = "", record: str = "") -> None:
    """Go on from the newest checkpoint, and save until step `steps` is saved; "5 x 100" saves step 5 a hundred times.

    Each checkpoint holds its own number everywhere, which is looked at when it is read. <run>/said gets a line before
    and after each save.  die: the system call, counted over CALLS, before which this process kills its group
    record     a file that gets a line for each of CALLS
    """
    dist.setup("cpu")
    run, model, before = Path(run_dir), Weights(), 0
    folder = dist.main_says(str(checkpoint.newest(run) or "") if dist.rank() == 0 else None)
    if folder:
        before = content(Path(str(folder)), model)
    if die or record:
        _at_each_call(_die_at(int(die)) if die else _note(Path(record)))
    once, _, often = steps.partition(" x ")
    for number in range(before + 1, (int(often) if often else int(once)) + 1):
        _say(run, f"begun {number}")
        with torch.no_grad():
            model.weight.fill_(number)
        state = {"optimizer": {"momentum": torch.full((WIDTH,), float(number))}}
        own = {"queue": torch.full((1000,), float(number + dist.rank()))}
        checkpoint.save(run, int(once) if often else number, model, state, {"number": number}, int(keep), own)
        _say(run, f"saved {number}")
    dist.teardown()


class Weights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WIDTH))


def content(folder: Path, model: nn.Module | None = None) -> int:
    """The number that every part of the checkpoint holds."""
    model = model or Weights()
    number = int(checkpoint.load_meta(folder)["number"])
    training = checkpoint.restore(folder, model, torch.device("cpu"))
    states = checkpoint.load_rank_states(folder)
    parts = [(model.get_parameter("weight"), number), (training["optimizer"]["momentum"], number)]
    parts += [(state["queue"], number + rank) for rank, state in enumerate(states)]
    assert all(torch.equal(part, torch.full_like(part, float(value))) for part, value in parts)
    return number


def said(run: Path, what: str) -> int:
    """The last number that was `what`: "begun" or "saved"; 0 if none was."""
    path = run / "said"
    words = [line.split() for line in path.read_text().splitlines()] if path.is_file() else []
    return max((int(number) for verb, number in words if verb == what), default=0)


def limit(ranks: str, num_bytes: str, module: str, *arguments: str) -> int:
    """`main(arguments)` of `module`, in which these ranks ("0 1") may write no file of more bytes."""
    if os.environ.get("RANK", "0") in ranks.split():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(num_bytes), resource.RLIM_INFINITY))
    return int(importlib.import_module(module).main(list(arguments)) or 0)


def _say(run: Path, line: str) -> None:
    if dist.rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        with (run / "said").open("a") as file:
            file.write(line + "\n")


def _at_each_call(hook: Callable[[str, tuple[Any, ...]], None]) -> None:
    for name in CALLS:
        real = getattr(os, name)

        def call(*arguments: Any, name: str = name, real: Any = real, **more: Any) -> Any:
            hook(name, arguments)
            return real(*arguments, **more)

        setattr(os, name, call)


def _die_at(number: int) -> Callable[[str, tuple[Any, ...]], None]:
    left = [number]

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.killpg(os.getpgrp(), signal.SIGKILL)
            time.sleep(60)  # a signal to oneself may come a moment later

    return hook


def _note(path: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """Lines {at, rank, call, path, size, to}: of an fsync the path and size of what is synced."""

    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        what = os.readlink(f"/proc/self/fd/{arguments[0]}") if name == "fsync" else os.fspath(arguments[0])
        line = {"at": time.monotonic_ns(), "rank": dist.rank(), "call": name, "path": what}
        line["size"] = os.path.getsize(what) if name == "fsync" else None
        line["to"] = os.fspath(arguments[1]) if name in ("rename", "replace") else None
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    return hook
