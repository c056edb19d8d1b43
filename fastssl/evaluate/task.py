"""What every evaluator is given, and what it gives back."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastssl import dist
from fastssl.evaluate.features import Features, features_of, width_of
from fastssl.evaluate.per_class import PerClass
from fastssl.evaluate.settings import EvaluateConfig
from fastssl.evaluate.subject import Subject
from pipelines.loader import Batch
from shard_tools.manifest import Manifest


@dataclass(frozen=True)
class Report:
    """metrics are fractions, by name; protocol says how they came about, in one line; rows fill the table.

    per_class   for the result file, a CSV beside it and, where there are many classes, the best and worst of them
    """

    metrics: dict[str, float]
    protocol: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    details: dict[str, Any] = field(default_factory=dict)
    per_class: PerClass | None = None


@dataclass(frozen=True)
class Task:
    """What is evaluated on what, for all evaluators."""

    cfg: EvaluateConfig
    subject: Subject
    train: Manifest
    test: Manifest
    device: torch.device

    @property
    def num_classes(self) -> int:
        return len(self.train.classes or ())

    def per_class(self, predicted: Tensor) -> PerClass:
        """Of the class numbers that a classifier gave the test samples, in the order of their ids."""
        labels = torch.from_numpy(self.test.index()["label"][: len(predicted)].astype("int64"))
        return PerClass(self.train.classes or (), labels, predicted)

    def features(self, manifest: Manifest, backbone: torch.nn.Module | None = None) -> Features:
        """Of `backbone`, the subject's own by default."""

        def show(batches: Iterable[Batch], total: int) -> Iterable[Batch]:
            if dist.rank() or not sys.stderr.isatty():
                return batches
            console = Console(stderr=True)
            return track(batches, f"features of {manifest.split}", total=total, console=console, transient=True)

        return features_of(
            backbone or self.subject.backbone, manifest, self.subject.view, device=self.device,
            precision=self.cfg.run.precision,
            batch_size=self.cfg.run.batch_size, loader=self.cfg.loader, limit=self.cfg.data.limit, show=show,
        )  # fmt: skip

    def result_path(self, name: str) -> Path | None:
        """Where the result of evaluator `name` goes; pictures and lists lie beside it. None: nowhere."""
        cfg, subject = self.cfg, self.subject
        if cfg.eval.out.endswith(".json"):
            return Path(cfg.eval.out)
        what = Path(cfg.checkpoint).name if subject.step is None else f"step-{subject.step:08d}"
        part = f"-limit-{cfg.data.limit}" if cfg.data.limit else ""  # a quick look must not overwrite the real result
        folder = Path(cfg.eval.out) if cfg.eval.out else subject.run_dir and subject.run_dir / "evaluation"
        return folder / f"{name}-{what}{part}.json" if folder else None

    def protocol(self, num_train: int = 0) -> str:
        """What every protocol line ends with: features, data, view. num_train 0: all training images, or the limit."""
        sizes = [min(self.cfg.data.limit or m.num_samples, m.num_samples) for m in (self.train, self.test)]
        sizes[0] = num_train or sizes[0]
        step = "" if self.subject.step is None else f" at step {self.subject.step}"
        view = self.subject.view
        return (
            f"{width_of(self.subject.backbone)} features of {self.subject.label}{step}, {self.cfg.run.precision}; "
            f"{sizes[0]:,} images of {self.train.split} and {sizes[1]:,} of {self.test.split}, {self.num_classes} "
            f"classes; shorter side to {view.resize} px, centre crop {view.size} px, mean {view.augment.mean}, "
            f"std {view.augment.std}"
        )


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"
