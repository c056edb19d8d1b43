"""The evaluators by name: their settings, the data they need, and what runs them. The only place that lists them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastssl import config
from fastssl.evaluate.classify import evaluate_knn, evaluate_published, evaluate_sweep
from fastssl.evaluate.finetune import FinetuneSettings, evaluate_finetune
from fastssl.evaluate.placement import evaluate_placement
from fastssl.evaluate.representation import RepresentationSettings, evaluate_representation
from fastssl.evaluate.select import SelectSettings, evaluate_select
from fastssl.evaluate.settings import EvaluateConfig, KnnSettings, PlacementSettings, ProtocolSettings, SweepSettings
from fastssl.evaluate.splits import train_and_test
from fastssl.evaluate.task import Report, Task
from fastssl.evaluate.voc07 import LowShotSettings, VocSettings, evaluate_low_shot, evaluate_voc07, trainval_and_test
from fastssl.evaluate.voc07_clsa import ClsaSettings, evaluate_clsa
from fastssl.evaluate.voc07_clsa import train_and_test as voc07_train_and_test
from fastssl.settings import require
from shard_tools.manifest import Manifest


def labelled(cfg: EvaluateConfig) -> tuple[Manifest, Manifest]:
    """A train and a test split of the same classes."""
    data = cfg.data
    return train_and_test(data.root, data.split, data.test_root, data.test_split, data.remote)


def one_split(cfg: EvaluateConfig) -> tuple[Manifest, Manifest]:
    """data.split alone, twice; labels are not needed."""
    manifest = Manifest.load(cfg.data.root, cfg.data.split, cfg.data.remote)
    return manifest, manifest


@dataclass(frozen=True)
class Evaluator:
    """settings: a frozen dataclass with the field `name`; evaluate(task, settings); data(cfg) -> (train, test)."""

    settings: type
    evaluate: Callable[[Task, Any], Report]
    data: Callable[[EvaluateConfig], tuple[Manifest, Manifest]] = labelled


EVALUATORS = {
    "knn": Evaluator(KnnSettings, evaluate_knn),
    "linear": Evaluator(SweepSettings, evaluate_sweep),
    "linear_moco": Evaluator(ProtocolSettings, evaluate_published),
    "linear_swav": Evaluator(ProtocolSettings, evaluate_published),
    "linear_swav_step": Evaluator(ProtocolSettings, evaluate_published),
    "linear_swav_6x6_bn": Evaluator(ProtocolSettings, evaluate_published),
    "linear_clsa": Evaluator(ProtocolSettings, evaluate_published),
    "finetune_1pct": Evaluator(FinetuneSettings, evaluate_finetune),
    "finetune_10pct": Evaluator(FinetuneSettings, evaluate_finetune),
    "finetune_full": Evaluator(FinetuneSettings, evaluate_finetune),
    "placement": Evaluator(PlacementSettings, evaluate_placement, one_split),
    "voc07": Evaluator(VocSettings, evaluate_voc07, trainval_and_test),
    "voc07_lowshot": Evaluator(LowShotSettings, evaluate_low_shot, trainval_and_test),
    "voc07_clsa": Evaluator(ClsaSettings, evaluate_clsa, voc07_train_and_test),
    "representation": Evaluator(RepresentationSettings, evaluate_representation, one_split),
    "select": Evaluator(SelectSettings, evaluate_select, one_split),
}


def find(cfg: EvaluateConfig) -> tuple[Evaluator, Any]:
    """The evaluator that the settings name, and its checked settings. Raises ValueError with key and remedy."""
    name = str(cfg.evaluator.get("name"))
    require(name in EVALUATORS, "evaluator.name", name, f"one of {', '.join(EVALUATORS)}")
    return EVALUATORS[name], config.convert(EVALUATORS[name].settings, cfg.evaluator, "evaluator")
