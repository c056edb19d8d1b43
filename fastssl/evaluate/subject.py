"""What is evaluated: a checkpoint's backbone, another project's, or one of two baselines, with the view that fits."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastssl import checkpoint, dist
from fastssl.evaluate.features import RawPixels
from fastssl.evaluate.settings import EvaluateConfig, EvaluateView
from fastssl.nn.encoder import build_encoder
from fastssl.settings import EncoderConfig, require
from fastssl.weights import read
from pipelines.augment import IMAGENET_MEAN, IMAGENET_STD, AugmentSpec
from pipelines.views import ViewSpec


@dataclass(frozen=True)
class Subject:
    """backbone in eval mode on the CPU; label such as "resnet50"; step and run_dir None if it is no checkpoint.

    view    the centre crop to test with, holding mean and std
    """

    backbone: nn.Module
    label: str
    step: int | None
    run_dir: Path | None
    view: ViewSpec


def load_subject(cfg: EvaluateConfig) -> Subject:
    """Raises CheckpointError or ValueError, with the remedy, if there is no such checkpoint or it does not fit."""
    like = checkpoint.load_settings(checkpoint.find(_folder(cfg.like))) if cfg.like else {}
    if cfg.checkpoint == "pixels":
        channels = (like.get("encoder") or dataclasses.asdict(cfg.encoder)).get("channels", 3)
        return Subject(RawPixels(channels=channels).eval(), "raw pixels at 16 x 16", None, None, _view(cfg, like))
    if cfg.checkpoint == "random":
        encoder = like.get("encoder") or dataclasses.asdict(cfg.encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.run.seed)
            backbone = build_encoder(**encoder).eval()
        return Subject(backbone, f"untrained {encoder['name']}", None, None, _view(cfg, like))
    if is_foreign(Path(cfg.checkpoint)):
        return _foreign(cfg, like)
    backbone, meta = checkpoint.load_backbone(_folder(cfg.checkpoint))
    run_dir = Path(meta["folder"]).resolve().parent.parent
    name = meta["config"]["encoder"]["name"]
    return Subject(backbone, name, int(meta["step"]), run_dir, _view(cfg, like or meta["config"]))


def is_foreign(path: Path) -> bool:
    """Whether `path` is a weight file by itself, and not the model.pt of a checkpoint folder."""
    return path.is_file() and not any((path.parent / name).exists() for name in ("meta.json", checkpoint.SUMS))


def _foreign(cfg: EvaluateConfig, like: dict[str, Any]) -> Subject:
    """A file of another project. Its encoder may be left out, so the default one of evaluate.yaml says nothing."""
    told = None if cfg.encoder == EncoderConfig() else cfg.encoder
    backbone, encoder, weights = read.load_backbone(Path(cfg.checkpoint), told)
    view = _view(cfg, like or usual_settings(encoder, backbone))
    mean = view.augment.mean
    require(
        len(mean) == encoder.channels, "data.mean", list(mean), f"one number for each of {encoder.channels} channels"
    )
    if dist.rank() == 0:
        if weights.caution:
            print(f"warning: {weights.caution}", file=sys.stderr)
        print(
            f"weights: {cfg.checkpoint} is {read.described(encoder)} ({weights.layout}); left out: "
            f"{read.left_out(weights)}\nview: {view.size} px of {view.resize}, mean {mean}, "
            f"std {view.augment.std}; change with view.size, view.resize, data.mean, data.std, or like=RUN"
        )
    return Subject(backbone, encoder.name, None, None, view)


def _view(cfg: EvaluateConfig, trained: dict[str, Any]) -> ViewSpec:
    return view_of(trained, cfg.view, cfg.data.mean, cfg.data.std)


def usual_settings(encoder: EncoderConfig, backbone: nn.Module) -> dict[str, Any]:
    """In place of a run's settings, for a file of another project: how large its images probably were."""
    timms: dict[str, Any] = getattr(backbone, "pretrained_cfg", {})
    usual_px = 32 if encoder.stem == "cifar" else 224
    return {"views": {"test": {"size": timms.get("input_size", (3, usual_px, usual_px))[-1]}}}


def view_of(
    trained: dict[str, Any],
    told: EvaluateView | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> ViewSpec:
    """The centre crop as told; what that leaves open is taken from the settings of a training run, {} for none."""
    told = told or EvaluateView()
    monitor = trained.get("knn", {})
    data = trained.get("data", {})
    views = trained.get("views", {})
    size, resize = crop_sizes(
        told.size or monitor.get("view_size", 0),
        told.resize or monitor.get("view_resize", 0),
        first_view_px(views),
    )
    mean = mean or tuple(data.get("mean", IMAGENET_MEAN))
    std = std or tuple(data.get("std", IMAGENET_STD))
    view: Mapping[str, Any] = next(iter(views.values()), {})
    augment = {**trained.get("augment", {}), **view.get("augment", {})}
    return center_view(size, resize, mean, std, str(view.get("crop", "")), augment)


def center_view(
    size: int,
    resize: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    trained_crop: str = "",
    trained_augment: Mapping[str, Any] | None = None,
) -> ViewSpec:
    """A view without any chance in it. Stamps, which are trained on turned crops, keep their scale and stretch."""
    if trained_crop == "turned":
        stretch = {key: value for key, value in (trained_augment or {}).items() if key in ("stretch", "floor")}
        augment = AugmentSpec(flip_p=0.0, mean=mean, std=std, **stretch)
        return ViewSpec(role="test", size=size, crop="turned", turn_deg=0.0, shift_px=0, augment=augment)
    augment = AugmentSpec(flip_p=0.0, mean=mean, std=std)
    return ViewSpec(role="test", size=size, crop="center", resize=resize, augment=augment)


def crop_sizes(size: int, resize: int, trained_px: int) -> tuple[int, int]:
    """Side of the crop and shorter side before it; 0 means the training view's side, and 256/224 of the crop's."""
    size = size or trained_px
    return size, resize or round(size * 256 / 224)


def first_view_px(views: dict[str, Any]) -> int:
    """Side of the first training view of a saved config; 224 where there is none."""
    return next((int(view["size"]) for view in views.values()), 224)


def _folder(path: str) -> Path:
    """A checkpoint's own file, such as model.pt, stands for its folder, whose other files say what it is."""
    return Path(path).parent if Path(path).is_file() else Path(path)
