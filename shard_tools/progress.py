"""A bar with images/s and MB/s on a terminal: rich's where it is installed, else plain lines; nothing in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_PLAIN_EVERY_S = 2.0


@dataclass
class Progress:
    """Images and bytes done since the start; `done` may begin above 0 when a pack continues."""

    total: int
    num_images: int = 0
    num_bytes: int = 0
    started: float = field(default_factory=time.monotonic)

    def advance(self, num_bytes: int, num_images: int = 1) -> None:
        """More images done, of `num_bytes` together."""
        self.num_images += num_images
        self.num_bytes += num_bytes

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-6)

    def rates(self) -> str:
        """`431 images/s, 47.2 MB/s`"""
        return f"{self.num_images / self.seconds:.0f} images/s, {self.num_bytes / self.seconds / 1e6:.1f} MB/s"


class _PlainBar(Progress):
    shown: float = 0.0

    def advance(self, num_bytes: int, num_images: int = 1) -> None:
        super().advance(num_bytes, num_images)
        if time.monotonic() - self.shown > _PLAIN_EVERY_S:
            self.shown = time.monotonic()
            print(f"{self.num_images}/{self.total} images, {self.rates()}", file=sys.stderr)


class _RichBar(Progress):
    bar: Any = None
    task: Any = None

    def advance(self, num_bytes: int, num_images: int = 1) -> None:
        super().advance(num_bytes, num_images)
        self.bar.update(self.task, completed=self.num_images, rates=self.rates())


@contextmanager
def shown(label: str, total: int) -> Iterator[Progress]:
    """A progress over `total` images, drawn on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield Progress(total)
        return
    try:
        from rich import progress as rich_progress
        from rich.console import Console
    except ImportError:
        yield _PlainBar(total)
        return
    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rates]}"),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
        progress = _RichBar(total)
        progress.bar, progress.task = bar, bar.add_task(label, total=total, rates="")
        yield progress
