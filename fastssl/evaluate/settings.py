"""The tree of settings of an evaluation; `configs/evaluate.yaml` and `configs/evaluator/` hold its values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fastssl import config
from fastssl.evaluate.linear import LinearProtocol
from fastssl.settings import EncoderConfig, LoaderConfig, require
from shard_tools.remote import Access


@dataclass(frozen=True)
class KnnSettings:
    """Every pair of k and temperature is reported; the first pair is the headline."""

    name: Literal["knn"]
    k: tuple[int, ...]
    temperature: tuple[float, ...]

    def __post_init__(self) -> None:
        require(bool(self.k) and min(self.k) >= 1, "evaluator.k", list(self.k), "numbers of neighbours, 1 or more")
        require(
            bool(self.temperature) and min(self.temperature) >= 0.01,
            "evaluator.temperature", list(self.temperature), "numbers of 0.01 or more",
        )  # fmt: skip


@dataclass(frozen=True)
class SweepSettings:
    """As the arguments of `linear.sweep`."""

    name: Literal["linear"]
    lr: tuple[float, ...]
    weight_decay: tuple[float, ...]
    epochs: int = 30
    batch_size: int = 256
    momentum: float = 0.9
    held_out: float = 0.1
    standardize: bool = True
    retrain: bool = True

    def __post_init__(self) -> None:
        require(bool(self.lr) and min(self.lr) > 0, "evaluator.lr", list(self.lr), "learning rates above 0")
        require(
            bool(self.weight_decay) and min(self.weight_decay) >= 0,
            "evaluator.weight_decay", list(self.weight_decay), "weight decays, 0 or more",
        )  # fmt: skip
        require(0 < self.held_out < 1, "evaluator.held_out", self.held_out, "a share between 0 and 1, such as 0.1")
        _require_training(self)


@dataclass(frozen=True)
class ProtocolSettings(LinearProtocol):
    """A published protocol: how the layer trains, its features and its training view (random resized crop and flip).

    pooling     of the backbone's last map: "global", or "swav_6x6" (see feature_forms.MapFeatures)
    test_views  1, the centre crop, or 10, the corners and the centre and their mirrors
    """

    name: Literal["linear_moco", "linear_swav", "linear_swav_step", "linear_swav_6x6_bn", "linear_clsa"] = "linear_moco"
    pooling: Literal["global", "swav_6x6"] = "global"
    test_views: Literal[1, 10] = 1
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip_p: float = 0.5

    def __post_init__(self) -> None:
        require(self.lr > 0, "evaluator.lr", self.lr, "above 0")
        require(self.weight_decay >= 0, "evaluator.weight_decay", self.weight_decay, "0 or more")
        _require_training(self)


@dataclass(frozen=True)
class PlacementSettings:
    """picture: a histogram beside the result file, and a gallery; false: neither.

    gallery     images whose mirrored copies and most similar images are shown: half drawn by run.seed, half those whose
                copies are placed worst; 0 draws no gallery
    neighbours  most similar images shown for each, by cosine as in the published galleries
    """

    name: Literal["placement"]
    metric: Literal["l1", "l2", "cosine"] = "l1"
    picture: bool = True
    gallery: int = 8
    neighbours: int = 6

    def __post_init__(self) -> None:
        require(self.gallery >= 0, "evaluator.gallery", self.gallery, "0 (no gallery) or more")
        require(self.neighbours >= 1, "evaluator.neighbours", self.neighbours, "1 or more")


@dataclass(frozen=True)
class EvaluateData:
    """Labelled shards; test_root and test_split may be "", mean and std None (see configs/evaluate.yaml)."""

    root: str
    split: str = "train"
    test_root: str = ""
    test_split: str = ""
    limit: int = 0
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    remote: Access = field(default_factory=Access)

    def __post_init__(self) -> None:
        require(self.limit >= 0, "data.limit", self.limit, "0 (all images) or more")


@dataclass(frozen=True)
class EvaluateView:
    """The centre crop in px; 0 leaves it to the checkpoint."""

    size: int = 0
    resize: int = 0


@dataclass(frozen=True)
class EvaluateRun:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "run.batch_size", self.batch_size, "1 or more")
        require(0 <= self.seed < 2**63, "run.seed", self.seed, "a whole number from 0")


@dataclass(frozen=True)
class EvaluateOut:
    out: str = ""


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything an evaluation is told. `evaluator` holds `name` and that evaluator's own settings."""

    evaluator: dict[str, Any]
    checkpoint: str
    data: EvaluateData
    encoder: EncoderConfig
    loader: LoaderConfig
    like: str = ""
    view: EvaluateView = field(default_factory=EvaluateView)
    run: EvaluateRun = field(default_factory=EvaluateRun)
    eval: EvaluateOut = field(default_factory=EvaluateOut)


def load(overrides: Sequence[str]) -> EvaluateConfig:
    """From overrides such as "evaluator=knn" to the checked settings. Raises ConfigError."""
    from fastssl.evaluate.registry import find  # which lists the evaluators, whose settings stand here

    cfg = config.convert(EvaluateConfig, config.compose("evaluate", overrides))
    find(cfg)
    return cfg


def _require_training(settings: SweepSettings | ProtocolSettings) -> None:
    require(settings.epochs >= 1, "evaluator.epochs", settings.epochs, "1 or more")
    require(settings.batch_size >= 1, "evaluator.batch_size", settings.batch_size, "1 or more")
    require(0 <= settings.momentum < 1, "evaluator.momentum", settings.momentum, "in [0, 1)")
