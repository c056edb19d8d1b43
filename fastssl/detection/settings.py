"""The tree of settings of a detection run; `configs/detect.yaml` and `configs/detection/` hold its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastssl import config
from fastssl.settings import EncoderConfig, require


@dataclass(frozen=True)
class DetectionData:
    """What to train on and what to test on; several parts are joined.

    format  voc: parts such as VOC2007/trainval, ROOT/VOC2007 being a devkit's folder;
            coco: parts such as train2017, ROOT/annotations/instances_train2017.json with the images in ROOT/train2017
    """

    root: str
    format: Literal["voc", "coco"]
    train: tuple[str, ...]
    test: tuple[str, ...]

    def __post_init__(self) -> None:
        for key in ("train", "test"):
            require(bool(getattr(self, key)), f"data.{key}", [], 'a list of parts, such as ["VOC2007/trainval"]')


@dataclass(frozen=True)
class DetectorConfig:
    """The detector, all sides in px.

    form        fpn: a feature pyramid; c4: one map of stage 3 for proposals, stage 4 as the head of each region
    norm        batch: batch norm over all GPUs (SyncBN) that goes on learning; frozen: as the checkpoint left it
    train_sizes the shorter side, one at random for each image; test_size its fixed one; max_size of the longer side
    anchors     sides: one for each level of the pyramid (stages 1 to 4 and one above), or all on the one map of c4
    proposals   kept before and after suppression: in training, in the test
    regions     regions of an image that the heads train on
    channels    of the pyramid and its heads
    precise_batches     batches whose batch norm statistics are averaged before a test; 0 tests with the running ones
    """

    form: Literal["fpn", "c4"]
    mask: bool
    norm: Literal["batch", "frozen"]
    train_sizes: tuple[int, ...]
    test_size: int
    max_size: int
    anchors: tuple[int, ...]
    proposals: tuple[int, int, int, int]
    regions: int = 512
    channels: int = 256
    precise_batches: int = 200

    def __post_init__(self) -> None:
        require(bool(self.train_sizes), "model.train_sizes", [], "a list of sides in px")
        wanted = "5 sides, one a level" if self.form == "fpn" else "one side or more"
        fits = len(self.anchors) == 5 if self.form == "fpn" else bool(self.anchors)
        require(fits, "model.anchors", list(self.anchors), wanted)
        require(self.precise_batches >= 0, "model.precise_batches", self.precise_batches, "0 or more")


@dataclass(frozen=True)
class ScheduleConfig:
    """SGD; batch_size and steps are of all ranks together; lr is written for it, and times gamma at each milestone."""

    batch_size: int
    lr: float
    steps: int
    milestones: tuple[int, ...]
    gamma: float = 0.1
    warmup: int = 100
    warmup_factor: float = 0.001
    momentum: float = 0.9
    weight_decay: float = 1e-4
    clip_norm: float = 0.0

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "optim.batch_size", self.batch_size, "1 or more")
        require(self.lr > 0, "optim.lr", self.lr, "above 0")
        require(self.steps >= 1, "optim.steps", self.steps, "1 or more")

    def lr_at(self, step: int) -> float:
        """Of step 0, 1, ...: a linear warm-up from warmup_factor * lr, then steps down."""
        share = min(1.0, step / self.warmup) if self.warmup else 1.0
        rise = self.warmup_factor * (1 - share) + share
        return self.lr * rise * self.gamma ** sum(step >= milestone for milestone in self.milestones)


@dataclass(frozen=True)
class DetectionRun:
    """dir "": beside the checkpoints of the run that is transferred. stop_after: end at that step; 0 at the last."""

    dir: str = ""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    workers: int = 4
    log_every: int = 20
    save_every: int = 1000
    keep: int = 2
    stop_after: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        require(self.log_every >= 1, "run.log_every", self.log_every, "1 or more")
        require(self.save_every >= 1, "run.save_every", self.save_every, "1 or more")
        require(self.keep >= 2, "run.keep", self.keep, "2 or more, so that one bad file never costs the run")
        require(self.workers >= 0, "run.workers", self.workers, "0 (none) or more")


@dataclass(frozen=True)
class DetectionConfig:
    """Everything a detection run is told. checkpoint: a run, one of its checkpoint folders, or "random"."""

    checkpoint: str
    preset: str
    encoder: EncoderConfig
    data: DetectionData
    model: DetectorConfig
    optim: ScheduleConfig
    run: DetectionRun


def load(overrides: Sequence[str]) -> DetectionConfig:
    """From overrides such as "detection=voc_c4" to the checked settings. Raises ConfigError."""
    return config.convert(DetectionConfig, config.compose("detect", overrides))
