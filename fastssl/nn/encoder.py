"""Backbones by name: torchvision's ResNets at any width, with a stem for the size of the images, timm's models, and
plain convolutional ones for stamps.

Parameter names are torchvision's (or timm's), so that trunks are interchangeable with published weights.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastssl.nn.conv_autoencoder import ConvEncoder

# resnet10 is one block a stage: what a CPU can train in minutes.
RESNETS: dict[str, tuple[type[BasicBlock | Bottleneck], tuple[int, int, int, int]]] = {
    "resnet10": (BasicBlock, (1, 1, 1, 1)),
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet26": (Bottleneck, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}

# kernel, stride and whether a max-pool of stride 2 follows
STEMS = {"imagenet": (7, 2, True), "small": (3, 2, False), "cifar": (3, 1, False)}


def build_encoder(
    name: str,
    stem: str = "imagenet",
    width: float = 1.0,
    channels: int = 3,
    conv: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A freshly initialised backbone, (B, C, S, S) float -> (B, num_features), with the attribute `num_features`.

    The arguments as in `settings.EncoderConfig`. Raises ValueError with the remedy.
    """
    if (name == "conv") != (conv is not None):
        raise ValueError(f"encoder.name is {name!r} and encoder.conv {conv!r}, but only the two together make sense")
    if conv is not None:
        return ConvEncoder(channels, **conv)
    if name.startswith("timm/"):
        return _timm_encoder(name.removeprefix("timm/"), stem, width, channels)
    if name not in RESNETS:
        near = difflib.get_close_matches(name, RESNETS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"encoder.name is {name!r}{hint}, but must be one of {', '.join(RESNETS)}, or timm/NAME")
    if stem not in STEMS:
        raise ValueError(f"encoder.stem is {stem!r}, but must be one of {', '.join(STEMS)}")
    if width <= 0 or (64 * width) % 1:
        raise ValueError(f"encoder.width is {width!r}, but 64 * width must be a whole number of channels above 0")
    block, layers = RESNETS[name]
    return ScaledResNet(block, layers, width, stem, channels)


class ScaledResNet(ResNet):
    """torchvision's ResNet v1.5 without `fc`, every stage `width` times as wide (SwAV's w2, w4: 2 and 4)."""

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: Sequence[int],
        width: float = 1.0,
        stem: str = "imagenet",
        channels: int = 3,
    ) -> None:
        self._width = width
        super().__init__(block, list(layers))
        if stem != "imagenet" or width != 1.0 or channels != 3:
            (kernel, stride, pool), stem_width = STEMS[stem], self._scaled(64)
            self.conv1 = nn.Conv2d(channels, stem_width, kernel, stride, padding=kernel // 2, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = nn.BatchNorm2d(stem_width)
            if not pool:
                self.maxpool = nn.Identity()
        self.num_features = self._scaled(512) * block.expansion
        self.fc = nn.Identity()

    def _make_layer(self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == 64:
            self.inplanes = self._scaled(64)  # torchvision fixes the stem at 64 channels
        return super()._make_layer(block, self._scaled(planes), blocks, stride, dilate)

    def _scaled(self, channels: int) -> int:
        return int(channels * self._width)


def _timm_encoder(name: str, stem: str, width: float, channels: int) -> nn.Module:
    import timm

    if stem != "imagenet" or width != 1.0:
        raise ValueError(f"encoder.stem and encoder.width do not apply to timm/{name}; leave them at imagenet and 1.0")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f" (did you mean 'timm/{near[0]}'?)" if near else ""
        raise ValueError(
            f"encoder.name is 'timm/{name}'{hint}, which timm does not know; timm.list_models() lists the names"
        )
    return timm.create_model(name, pretrained=False, num_classes=0, in_chans=channels)
