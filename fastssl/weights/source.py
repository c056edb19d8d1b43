"""What is exported: the backbone of a checkpoint or of another project's file, with what is known about it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fastssl import checkpoint
from fastssl.config import convert
from fastssl.evaluate.subject import is_foreign, usual_settings, view_of
from fastssl.settings import EncoderConfig
from fastssl.weights.read import described, left_out, load_backbone
from pipelines.views import ViewSpec

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")  # those that every project knows
OTHERS = "export it as safetensors, torch-export or onnx"  # which hold any encoder


@dataclass(frozen=True)
class Source:
    """backbone in eval mode on the CPU.

    view        the centre crop that it is tested with, holding mean and std
    origin      a sentence part, such as "step 500 of runs/moco" or "moco.pth.tar (MoCo, ...)"
    settings    of the training run; {} for another project's file
    folder      of the checkpoint
    """

    backbone: nn.Module
    encoder: EncoderConfig
    view: ViewSpec
    origin: str
    settings: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    folder: Path | None = None


def load(path: Path, encoder: EncoderConfig | None = None) -> Source:
    """From a run, a checkpoint folder, or a weight file of another project, whose encoder may be named.

    Raises WeightsError, CheckpointError or ValueError, with the remedy.
    """
    if is_foreign(path):
        backbone, encoder, weights = load_backbone(path, encoder)
        view = view_of(usual_settings(encoder, backbone))
        if weights.caution:
            print(f"warning: {weights.caution}", file=sys.stderr)
        origin = f"{path.name} ({weights.layout}; left out: {left_out(weights)})"
        return Source(backbone, encoder, view, origin)
    if encoder is not None:
        raise ValueError(f"--encoder is {encoder.name!r}, but {path} knows its encoder; leave --encoder out")
    backbone, meta = checkpoint.load_backbone(path.parent if path.is_file() else path)
    settings, folder = meta["config"], Path(meta["folder"]).resolve()
    name = folder.parent.parent.name
    own = convert(EncoderConfig, settings["encoder"], "encoder")
    return Source(backbone, own, view_of(settings), f"step {meta['step']} of {name}", settings, meta["step"], folder)


def resnet_name(source: Source, form: str, names: tuple[str, ...] = RESNETS) -> str:
    """The ResNet, if it is what other projects know by that name. Raises ValueError if `form` cannot hold it."""
    encoder = source.encoder
    name = encoder.name.removeprefix("timm/").partition(".")[0]  # timm's of these names are torchvision's
    if name not in names or encoder != EncoderConfig(encoder.name):
        raise ValueError(
            f"format {form} holds {', '.join(names)} of the usual stem, width and three channels, but {source.origin} "
            f"is {described(encoder)}; {OTHERS}"
        )
    return name
