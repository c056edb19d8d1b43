"""Exports that are tensors by name: torchvision's, DETR's, and our own names in a safetensors file."""

from __future__ import annotations

import dataclasses
import io
import json

import torch
from torch import Tensor

from fastssl.weights.read import COUNTER
from fastssl.weights.source import RESNETS, Source, resnet_name


def torchvision_file(source: Source) -> bytes:
    """A state_dict for torchvision.models.NAME(), whose fc it does not have."""
    resnet_name(source, "torchvision", (*RESNETS, "resnet10", "resnet26"))
    return _torch_file(tensors(source))


def detr_file(source: Source) -> bytes:
    """A state_dict for DETR's backbone, a torchvision ResNet with frozen batch norm, which has no counters."""
    resnet_name(source, "detr")
    return _torch_file({key: value for key, value in tensors(source).items() if not key.endswith(COUNTER)})


def safetensors_file(source: Source) -> bytes:
    """Any encoder under our own names, and a note on which one it is, by which `fastssl` reads the file again."""
    from safetensors.torch import save

    note = json.dumps(dataclasses.asdict(source.encoder))
    return save(tensors(source), {"fastssl_encoder": note})  # one entry: several come in an order of chance


def tensors(source: Source) -> dict[str, Tensor]:
    """The backbone's, by name, contiguous, floats in float32."""
    state = source.backbone.state_dict()
    return {key: (value.float() if value.is_floating_point() else value).contiguous() for key, value in state.items()}


def _torch_file(state: dict[str, Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()
