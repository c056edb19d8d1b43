"""MoCo with a decoder: the query's code must find its key and also redraw the query; and the plain autoencoder.

Made for images of galaxies, where a reconstruction alone orders the codes by position angle and a contrast alone may
forget what a galaxy looks like. The joint loss is

    L = contrast_weight * InfoNCE(q / |q|, k / |k|) + reconstruction_weight * R(decoder(q), query view, weight)

with the decoder reading q as it is before it is normalised. The target is the query view itself, augmented as it is.
In the published code (grantmerz/moco) the contrastive term is commented out of the loss; the names of its results say
that the joint form was run, with a reconstruction weight of 50, a mask and log10 pixels. What departs from it:
- the mean of the masked error can be taken over the weights' sum (reconstruction: "weights") instead of over all
  elements ("elements", as published), which makes an emptier image count less;
- the loss is computed in float32 instead of the mask's float64.
What MoCo itself departs in is listed in momentum.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.losses import feature_std, info_nce
from fastssl.methods.base import Method, Output, RunFacts, Views, require_roles
from fastssl.methods.momentum import Encoder, MomentumConfig, MomentumMethod, unit_rows
from fastssl.nn.conv_autoencoder import ConvDecoder
from fastssl.nn.sync_batchnorm import sync_batchnorm_
from fastssl.settings import require

# B images per rank, N channels (bands), S side in px, C width of the code (dim), K queue length


@dataclass(frozen=True)
class DecoderConfig:
    """As the arguments of `nn.conv_autoencoder.ConvDecoder`; it must end at the side of the query view."""

    channels: int
    start: tuple[int, int]
    layers: tuple[tuple[int, int, int], ...]
    last_kernel: int = 7
    activation: Literal["relu", "prelu"] = "prelu"
    enlarge: Literal["nearest", "transposed"] = "nearest"
    output: Literal["linear", "sigmoid", "relu"] = "linear"
    batch_norm: bool = True

    def build(self, features: int) -> ConvDecoder:
        return ConvDecoder(features, **vars(self))


@dataclass(frozen=True, kw_only=True)
class MocoDecoderConfig(MomentumConfig):
    """MoCo's settings and the reconstruction's.

    empty_weight    what a pixel counts whose `weight` is 0; 0 leaves it out, as published
    reconstruction  what the sum of weighted squared errors is divided by: the number of "elements", or the sum of the
                    "weights"
    """

    decoder: DecoderConfig
    name: str = "moco_decoder"
    contrast_weight: float = 1.0
    reconstruction_weight: float = 50.0
    empty_weight: float = 0.0
    reconstruction: Literal["elements", "weights"] = "elements"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.contrast_weight >= 0.0, "method.contrast_weight", self.contrast_weight, "0 or more")
        _check_reconstruction(self.reconstruction_weight, self.empty_weight)


class MocoDecoder(MomentumMethod):
    """Views: `query` 1, `key` 1, and `weight` 0 or 1, with the query's random numbers; each (B, N, S, S)."""

    def __init__(self, backbone: nn.Module, config: MocoDecoderConfig, facts: RunFacts) -> None:
        require_roles("moco_decoder", facts.roles, {"query": 1, "key": 1}, weight=0)
        super().__init__(backbone, config, facts)
        self.config = config
        self.decoder = config.decoder.build(config.dim)
        if config.batch_norm == "sync" and dist.world() > 1:
            sync_batchnorm_(self.decoder)

    def forward(self, views: Views, step: int) -> Output:
        (query_view,), (key_view,) = views["query"], views["key"]
        code = self.encoder_q(query_view)
        keys = self.keys(key_view, step)
        contrast, logs = info_nce(unit_rows(code), dist.own_rows(keys), self.queue, self.config.temperature)
        error = reconstruction_error(
            self.decoder(code), query_view, _weight(views), self.config.empty_weight, self.config.reconstruction
        )
        loss = self.config.contrast_weight * contrast + self.config.reconstruction_weight * error
        parts = {"contrast": contrast.detach(), "reconstruction": error.detach(), "queue_filled": self.queue_filled()}
        return Output(loss, {**parts, **logs}, carry=(keys,))

    def reconstruct(self, images: Tensor) -> Tensor:
        """(B, N, S, S) -> what the decoder makes of their codes, in the same units."""
        return self.decoder(self.encoder_q(images))

    def chance_level(self) -> None:
        """None: the reconstruction has no such level, and the contrast's, ln(K + 1), is only a part of the loss."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """The baseline without keys: settings as those of `MocoDecoderConfig`."""

    decoder: DecoderConfig
    name: str = "autoencoder"
    dim: int = 128
    head: Literal["none", "linear", "mlp"] = "none"
    empty_weight: float = 0.0
    reconstruction: Literal["elements", "weights"] = "elements"

    def __post_init__(self) -> None:
        require(self.dim >= 1, "method.dim", self.dim, "1 or more")
        _check_reconstruction(1.0, self.empty_weight)


class Autoencoder(Method):
    """Views: `query` 1, and `weight` 0 or 1."""

    def __init__(self, backbone: nn.Module, config: AutoencoderConfig, facts: RunFacts) -> None:
        super().__init__()
        require_roles("autoencoder", facts.roles, {"query": 1}, weight=0)
        self.config = config
        self.encoder = Encoder(backbone, config.dim, config.head)
        self.decoder = config.decoder.build(config.dim)

    def forward(self, views: Views, step: int) -> Output:
        (query_view,) = views["query"]
        code = self.encoder(query_view)
        error = reconstruction_error(
            self.decoder(code), query_view, _weight(views), self.config.empty_weight, self.config.reconstruction
        )
        return Output(error, {"feature_std": feature_std(unit_rows(code))})

    def backbone(self) -> nn.Module:
        return self.encoder.backbone

    def reconstruct(self, images: Tensor) -> Tensor:
        """As `MocoDecoder.reconstruct`."""
        return self.decoder(self.encoder(images))


def reconstruction_error(
    drawn: Tensor, target: Tensor, weight: Tensor | None, empty_weight: float, per: Literal["elements", "weights"]
) -> Tensor:
    """Squared error of `drawn` against `target`, both (B, N, S, S), in at least float32: a scalar.

    weight      (B, N, S, S) in [0, 1], or None for 1 everywhere; where it is 0 an error counts `empty_weight`
    per         "elements": the mean over all elements; "weights": the sum divided by the sum of the weights
    Raises ValueError if the decoder's size is not the view's.
    """
    if drawn.shape != target.shape:
        raise ValueError(
            f"method.decoder draws {tuple(drawn.shape[1:])}, but the query view is {tuple(target.shape[1:])}; "
            f"change method.decoder, or views.query.size and encoder.channels"
        )
    dtype = torch.promote_types(target.dtype, torch.float32)
    with torch.autocast(drawn.device.type, enabled=False):
        squared = (drawn.to(dtype) - target.to(dtype)) ** 2
        if weight is None:
            return squared.mean()
        weight = empty_weight + (1.0 - empty_weight) * weight.to(dtype)
        total = (weight * squared).sum()
        return total / (squared.numel() if per == "elements" else weight.sum().clamp(min=1.0))


def _weight(views: Views) -> Tensor | None:
    given = views.get("weight", ())
    return given[0] if len(given) else None


def _check_reconstruction(reconstruction_weight: float, empty_weight: float) -> None:
    require(
        math.isfinite(reconstruction_weight) and reconstruction_weight >= 0.0,
        "method.reconstruction_weight", reconstruction_weight, "0 or more",
    )  # fmt: skip
    require(0.0 <= empty_weight <= 1.0, "method.empty_weight", empty_weight, "between 0 and 1")
