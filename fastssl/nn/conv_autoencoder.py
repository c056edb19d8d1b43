"""Plain convolutional encoders and decoders for stamps: one configurable form of each for the whole published family.

MoCo with a decoder for galaxy images was published with some thirty encoder and decoder files that differ in widths,
kernels, activation and the way of enlarging; `layers` and the few options here express them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

# B images, C channels (bands), S side in px, D width of the code

Activation = Literal["relu", "prelu"]


class ConvEncoder(nn.Module):
    """(B, C, S, S) -> (B, D): convolutions with batch norm, then one linear layer on the flattened map.

    layers      (channels, kernel, stride) of each convolution; S must be a multiple of the product of the strides
    squash      the code goes through `Squash`
    Kaiming-normal weights for ReLU and zero biases, as in the published code. `num_features` is D.
    """

    def __init__(
        self,
        channels: int,
        side: int,
        layers: Sequence[Sequence[int]],
        features: int,
        activation: Activation = "relu",
        squash: bool = False,
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        before = channels
        for width, kernel, stride in layers:
            if side % stride:
                raise ValueError(f"encoder.conv.layers halves {side} px by a stride of {stride}; choose another side")
            stages += [
                nn.Conv2d(before, width, kernel, stride, kernel // 2),
                nn.BatchNorm2d(width),
                _active(activation),
            ]
            before, side = width, side // stride
        self.stages = nn.Sequential(*stages)
        self.project = nn.Linear(before * side * side, features)
        self.squash = Squash() if squash else nn.Identity()
        self.num_features = features
        _initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.squash(self.project(self.stages(images).flatten(1)))


class ConvDecoder(nn.Module):
    """(B, D) -> (B, C, S, S): one linear layer to a small map, then transposed convolutions with batch norm.

    start       (channels, side) of the small map
    layers      (channels, kernel, enlarge) of each layer, enlarge being the factor by which its input grows first
    enlarge     "nearest": by repeating pixels; "transposed": by the stride of the layer's own convolution
    last_kernel of the layer that makes the C channels, to which `output` applies: it must suit the input's values,
                "sigmoid" for [0, 1], "linear" for logarithms, "relu" for values from 0
    """

    def __init__(
        self,
        features: int,
        channels: int,
        start: Sequence[int],
        layers: Sequence[Sequence[int]],
        last_kernel: int = 3,
        activation: Activation = "prelu",
        enlarge: Literal["nearest", "transposed"] = "nearest",
        output: Literal["linear", "sigmoid", "relu"] = "linear",
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        self.start = (start[0], start[1], start[1])
        self.project = nn.Sequential(nn.Linear(features, start[0] * start[1] ** 2), _active(activation))
        stages: list[nn.Module] = []
        before, self.side = start
        for width, kernel, factor in layers:
            if factor > 1 and enlarge == "nearest":
                stages.append(nn.Upsample(scale_factor=factor, mode="nearest"))
            stride = factor if enlarge == "transposed" else 1
            stages.append(nn.ConvTranspose2d(before, width, kernel, stride, kernel // 2, output_padding=stride - 1))
            stages += [nn.BatchNorm2d(width)] if batch_norm else []
            stages.append(_active(activation))
            before, self.side = width, self.side * factor
        self.stages = nn.Sequential(*stages)
        self.last = nn.ConvTranspose2d(before, channels, last_kernel, padding=last_kernel // 2)
        self.output = {"linear": nn.Identity, "sigmoid": nn.Sigmoid, "relu": nn.ReLU}[output]()
        _initialise(self)

    def forward(self, codes: Tensor) -> Tensor:
        return self.output(self.last(self.stages(self.project(codes).view(-1, *self.start))))


class Squash(nn.Module):
    """v -> v / |v| * |v|^2 / (1 + |v|^2) for each row (Sabour et al., arXiv:1710.09829, eq. 1); 0 stays 0.

    Written without the division by |v|, which makes a zero row NaN in the published code.
    """

    def forward(self, codes: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(codes, dim=1, keepdim=True)
        return codes * norm / (1 + norm**2)


def _active(activation: Activation) -> nn.Module:
    return nn.PReLU() if activation == "prelu" else nn.ReLU()


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
            nn.init.zeros_(part.bias)  # type: ignore[arg-type]
