"""The methods by name. A method's file holds its maths and its settings; this is the only place that lists them."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastssl.methods.base import Method, Output, RunFacts
from fastssl.methods.clsa import Clsa, ClsaConfig
from fastssl.methods.moco import Moco, MocoConfig
from fastssl.methods.moco_decoder import Autoencoder, AutoencoderConfig, MocoDecoder, MocoDecoderConfig
from fastssl.methods.swav import Swav, SwavConfig
from fastssl.methods.unmix_moco import UnmixMoco, UnmixMocoConfig
from fastssl.methods.unmix_swav import UnmixSwav, UnmixSwavConfig

METHODS: dict[str, tuple[type[Method], type]] = {
    "moco": (Moco, MocoConfig),
    "clsa": (Clsa, ClsaConfig),
    "unmix_moco": (UnmixMoco, UnmixMocoConfig),
    "moco_decoder": (MocoDecoder, MocoDecoderConfig),
    "autoencoder": (Autoencoder, AutoencoderConfig),
    "swav": (Swav, SwavConfig),
    "unmix_swav": (UnmixSwav, UnmixSwavConfig),
}

__all__ = ["METHODS", "Method", "Output", "RunFacts", "build_method"]


def build_method(settings: dict[str, Any], backbone: nn.Module, facts: RunFacts) -> Method:
    """The method that `settings["name"]` names, over `backbone`. Raises ValueError."""
    from fastssl.config import convert

    name = settings.get("name")
    if name not in METHODS:
        raise ValueError(f"method.name is {name!r}, but must be one of {', '.join(METHODS)}")
    method_class, config_class = METHODS[name]
    return method_class(backbone, convert(config_class, settings, "method"), facts)
