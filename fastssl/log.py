"""What a run tells: a progress line in a terminal, metrics.jsonl, TensorBoard; images per second and time waiting.

Only rank 0 writes. Values stay on the device until a log line is due, so that the loop never waits for the GPU.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column
from torch import Tensor

from fastssl import dist
from fastssl.health import HealthWatch
from fastssl.methods.base import Output
from shard_tools.disk import write_file

PLAIN_LINE_EVERY_S = 30.0  # without a terminal, a line at most this often


class RunLog:
    """The log of one run in `run_dir`, from step `start` of `total`; `chance` is the method's chance level.

    Lines of metrics.jsonl behind `start` belong to a life that was lost after its last checkpoint; they are removed.
    """

    def __init__(
        self, run_dir: Path, start: int, total: int, batch_size: int, every: int, chance: float | None = None
    ) -> None:
        self._watch = HealthWatch(chance)
        self.batch_size, self.every, self.total = batch_size, every, total
        self._sum: Tensor | None = None
        self._names: list[str] = []
        self._count = 0
        self._waited_s = 0.0
        self._num_replaced = 0
        self.bad: set[str] = set()  # what is wrong with each sample that was replaced in this process
        self._bad_list = run_dir / f"bad-samples-rank-{dist.rank()}.txt"
        self._listed = set(self._bad_list.read_text().splitlines()) if self._bad_list.is_file() else set()
        self._window_began = time.perf_counter()
        self._progress: Progress | None = None
        self._last_plain_line = 0.0
        self.main = dist.rank() == 0
        if not self.main:
            return
        from torch.utils.tensorboard import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        self._jsonl = _reopen(run_dir / "metrics.jsonl", start)
        self._board = SummaryWriter(str(run_dir), purge_step=start + 1)
        if sys.stderr.isatty():
            self._progress = _progress_bar()
            self._task = self._progress.add_task("", total=total, completed=start)
            self._progress.start()

    def say(self, text: str) -> None:
        """A line for the reader, above the progress bar."""
        if not self.main:
            return
        if self._progress:
            self._progress.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def bad_samples(self, sentences: Sequence[str]) -> None:
        """Name each sample that was replaced, once a run: to the reader, on every rank, and in a file of the rank's."""
        self.bad.update(sentences)
        for sentence in dict.fromkeys(sentences):
            if sentence in self._listed:
                continue
            self._listed.add(sentence)
            warning = f"warning: {sentence}; another one took its place"
            if self.main:
                self.say(warning)
            else:
                print(warning, file=sys.stderr, flush=True)
            self._bad_list.parent.mkdir(parents=True, exist_ok=True)  # rank 0 may not have come to it yet
            with self._bad_list.open("a") as file:
                file.write(sentence + "\n")

    def step(
        self,
        step: int,
        output: Output,
        lr: float,
        waited_s: float,
        replaced: Sequence[str] = (),
        rejected: Tensor | None = None,
    ) -> None:
        """After step `step` (0-based). A collective each `every` steps.

        rejected    boolean scalar on the device, equal on all ranks: then the step is counted, and in no mean
        """
        values = {"loss": output.loss, **output.logs}
        self._names = list(values)
        packed = torch.stack([*(v.detach().float() for v in values.values()), torch.ones_like(output.loss.detach())])
        if rejected is not None:
            packed = torch.where(rejected, 0.0, packed)
        self._sum = packed if self._sum is None else self._sum + packed
        self._count += 1
        self._waited_s += waited_s
        self._num_replaced += len(replaced)
        self.bad_samples(replaced)
        done = step + 1
        if done % self.every and done != self.total:
            if self._progress:
                self._progress.update(self._task, completed=done)
            return
        *sums, taken = dist.all_reduce_mean(self._sum / self._count).tolist()  # taken: the share of steps, 1 if healthy
        means = {name: value / taken for name, value in zip(self._names, sums)} if taken else {}
        elapsed = time.perf_counter() - self._window_began
        rates = {
            "lr": lr,
            "images_per_s": self._count * self.batch_size / elapsed,
            "step_s": elapsed / self._count,
            "data_wait": self._waited_s / elapsed,
            "replaced_samples": float(dist.all_reduce_sum(torch.tensor(self._num_replaced)).item()),
            "rejected_steps": float(round(self._count * (1.0 - taken))),
        }
        self.record(done, {**means, **rates})
        self._show(done, means.get("loss"), rates, elapsed / self._count)
        for sentence in self._watch.look(done, means):
            self.say(f"warning: {sentence}")
        self._sum, self._count, self._waited_s, self._window_began = None, 0, 0.0, time.perf_counter()
        self._num_replaced = 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what happens inside (an evaluation, a save) out of the rates."""
        began = time.perf_counter()
        yield
        self._window_began += time.perf_counter() - began

    def record(self, step: int, values: dict[str, float]) -> None:
        """A line of metrics.jsonl and TensorBoard scalars."""
        if not self.main:
            return
        self._jsonl.write(json.dumps({"step": step, "images": step * self.batch_size, **values}) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if not self.main:
            return
        if self._progress:
            self._progress.stop()
        self._jsonl.close()
        self._board.close()

    def _show(self, done: int, loss: float | None, rates: dict[str, float], step_s: float) -> None:
        if not self.main:
            return
        speed = f"{rates['images_per_s']:.0f} images/s, {rates['data_wait']:.1%} waiting"
        shown = "every step rejected" if loss is None else f"loss {loss:.3f}"
        text = f"{shown}  lr {rates['lr']:.2g}  {speed}"
        if self._progress:
            self._progress.update(self._task, completed=done, description=text)
        elif done == self.total or time.monotonic() - self._last_plain_line >= PLAIN_LINE_EVERY_S:
            eta = time.strftime("%H:%M:%S", time.gmtime((self.total - done) * step_s))
            print(f"step {done}/{self.total}  {text}  ETA {eta}", file=sys.stderr, flush=True)
            self._last_plain_line = time.monotonic()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, oldest first; a last line cut by a crash is left out."""
    path = run_dir / "metrics.jsonl"
    return _whole_lines(path) if path.is_file() else []


def _reopen(path: Path, start: int) -> Any:
    kept = [line for line in _whole_lines(path) if line["step"] <= start] if path.is_file() else []
    # not in place: a job that is killed here must not lose its metrics
    write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return path.open("a")


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _progress_bar() -> Progress:
    return Progress(
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),  # what 80 columns leave
        TextColumn("ETA", table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        expand=True,
        refresh_per_second=4,
    )
