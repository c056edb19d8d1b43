"""Exports as folders for timm and the Hugging Face hub: model.safetensors, config.json, and the hub's model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from fastssl.weights.card import model_card
from fastssl.weights.source import OTHERS, RESNETS, Source, resnet_name
from fastssl.weights.state_dicts import tensors

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def timm_folder(source: Source) -> dict[str, bytes]:
    """For `timm.create_model("local-dir:FOLDER", pretrained=True, num_classes=0)`; mean, std and size come with it."""
    import timm
    from safetensors.torch import save

    name = _timm_name(source)
    with torch.device("meta"):
        model: Any = timm.create_model(name, num_classes=0)
    config = {
        "architecture": name,
        "num_classes": 0,
        "num_features": model.num_features,
        "pretrained_cfg": _input(source, model.pretrained_cfg),
    }
    return {
        WEIGHTS: save(tensors(source), {"format": "pt"}),
        CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }


def huggingface_folder(source: Source) -> dict[str, bytes]:
    """The same, with a README.md filled from the run and its evaluations: a model repository of the hub."""
    return timm_folder(source) | {CARD: model_card(source).encode()}


def _timm_name(source: Source) -> str:
    """Raises ValueError if timm cannot build the encoder by a name alone."""
    name = source.encoder.name
    if source.view.crop != "center":
        raise ValueError(f"format timm prepares photographs only, but {source.origin} was trained on stamps; {OTHERS}")
    if name.startswith("timm/") and source.encoder.channels == 3:
        return name.removeprefix("timm/").partition(".")[0]  # the tag names weights, which are others here
    return resnet_name(source, "timm", (*RESNETS, "resnet26"))


def _input(source: Source, timms: Mapping[str, Any]) -> dict[str, Any]:
    """timm's pretrained_cfg: how to prepare images, and which layers its options exchange."""
    view = source.view
    return {
        "tag": "fastssl",
        "custom_load": False,
        "input_size": [source.encoder.channels, view.size, view.size],
        "fixed_input_size": timms["fixed_input_size"],
        "interpolation": "bilinear",
        "crop_pct": view.size / view.resize,
        "crop_mode": "center",
        "mean": list(view.augment.mean),
        "std": list(view.augment.std),
        "num_classes": 0,
        "pool_size": timms.get("pool_size"),
        "first_conv": timms.get("first_conv"),
        "classifier": timms.get("classifier"),
    }
