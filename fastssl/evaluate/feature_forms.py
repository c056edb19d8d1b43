"""Other forms of a backbone's features that published protocols use: SwAV's 6x6 pooling, and ten test crops."""

# B images, C channels, S side of a view in px, R side of the square it is cut from
# F channels and M side of the last map, P side after pooling
from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.resnet import ResNet

from fastssl.evaluate.features import Features, evaluating, width_of
from fastssl.evaluate.task import Task
from fastssl.settings import require
from pipelines.views import ViewSpec

WINDOW = 6  # of the pooling; a ResNet's map of a 224 px view is 7 x 7


class MapFeatures(nn.Module):
    """(B, C, S, S) -> (B, F * P * P): average pooling by 6x6 windows at stride 1 instead of over the whole map.

    SwAV's code (arXiv:2006.09882) without --global_pooling: a map of 7 x 7 becomes P x P = 2 x 2, so 8192 features of a
    ResNet-50. Channels first: the P * P values of a channel stand together. `num_features` is F * P * P.
    Raises ValueError if the backbone is no ResNet, or its map of a view of `view_px` is smaller than the window.
    """

    def __init__(self, backbone: nn.Module, view_px: int) -> None:
        super().__init__()
        if not isinstance(backbone, ResNet):
            raise ValueError(
                f"evaluator.pooling is 'swav_6x6', which needs the last map of a ResNet, and this is a "
                f"{type(backbone).__name__}; say evaluator.pooling=global"
            )
        self.backbone = backbone
        weight = backbone.conv1.weight
        with torch.no_grad(), evaluating(backbone):
            self.map_px = self._map(weight.new_zeros(1, weight.shape[1], view_px, view_px)).shape[-1]
        if self.map_px < WINDOW:
            raise ValueError(
                f"evaluator.pooling is 'swav_6x6', but the last map of a view of {view_px} px is {self.map_px} x "
                f"{self.map_px}; say evaluator.pooling=global, or a larger view.size"
            )
        self.num_features = width_of(backbone) * (self.map_px - WINDOW + 1) ** 2

    def forward(self, images: Tensor) -> Tensor:
        return functional.avg_pool2d(self._map(images), WINDOW, stride=1).flatten(1)

    def _map(self, images: Tensor) -> Tensor:
        """(B, F, M, M): what the last stage gives; fetched by a hook, so that parameters keep their names."""
        caught: list[Tensor] = []
        hook = self.backbone.layer4.register_forward_hook(lambda module, given, result: caught.append(result))
        try:
            self.backbone(images)
        finally:
            hook.remove()
        return caught[0]


class TenCrops(nn.Module):
    """(B, C, R, R) -> (B, F): mean features of the four corners, the centre, and their mirrors, each `size` px.

    Krizhevsky et al. 2012, section 4.1, who average probabilities. Averaging features is averaging the logits of any
    linear layer on them, and takes a tenth of the memory.
    """

    def __init__(self, backbone: nn.Module, size: int) -> None:
        super().__init__()
        self.backbone, self.size, self.num_features = backbone, size, width_of(backbone)

    def forward(self, images: Tensor) -> Tensor:
        edge = images.shape[-1] - self.size
        middle = round(edge / 2)
        total = torch.zeros((), device=images.device)
        for top, left in ((0, 0), (0, edge), (edge, 0), (edge, edge), (middle, middle)):
            crop = images[:, :, top : top + self.size, left : left + self.size]
            for view in (crop, crop.flip(-1)):
                total = total + self.backbone(view.contiguous(memory_format=torch.channels_last))
        return total / 10


def tested_features(task: Task, backbone: nn.Module, test_views: int) -> Features:
    """Of the test split, through the centre crop (test_views 1) or the mean over ten crops. Raises ValueError."""
    if test_views == 1:
        return task.features(task.test, backbone)
    subject = dataclasses.replace(task.subject, view=whole_square(task.subject.view))
    return dataclasses.replace(task, subject=subject).features(task.test, TenCrops(backbone, task.subject.view.size))


def whole_square(view: ViewSpec) -> ViewSpec:
    """The square that a centre crop is cut from. Raises ValueError if ten crops of it would all be the same one."""
    require(view.crop == "center", "evaluator.test_views", 10, "1 for stamps, which are seen in their own scale")
    require(view.resize > view.size, "view.resize", view.resize, f"above view.size={view.size} for ten different crops")
    return dataclasses.replace(view, size=view.resize)


def ten_crops_line(view: ViewSpec, test_views: int) -> str:
    """What the protocol line adds, "" for the centre crop that it speaks of anyway."""
    if test_views == 1:
        return ""
    return (
        f"; tested on ten crops of {view.size} px, not the centre alone: the corners and the centre of the central "
        f"{view.resize} px, and their mirrors, logits averaged"
    )
