"""torchvision's Faster and Mask R-CNN around a pre-trained ResNet, with a feature pyramid (fpn) or a C4 head.

c4 follows the transfer that MoCo published (arXiv:1911.05722, appendix A.1): proposals and regions come from stage 3,
stage 4 is the head of each 14 x 14 region, and one more batch norm follows it.
Departures from detectron2's detector: torchvision's losses of boxes (smooth L1 with beta 1/9, theirs is plain L1) and
its rounding of anchors; with masks, stage 4 runs a second time on the positives instead of once for both heads.
"""

# n regions, D channels of the last stage, S side of the region's map
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.resnet import ResNet
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, roi_align

from fastssl import dist
from fastssl.detection.settings import DetectorConfig
from pipelines.augment import IMAGENET_MEAN, IMAGENET_STD

RATIOS = (0.5, 1.0, 2.0)
STAGES = ("layer1", "layer2", "layer3", "layer4")


def build_detector(
    encoder: nn.Module,
    cfg: DetectorConfig,
    num_classes: int,
    mean: tuple[float, ...] = IMAGENET_MEAN,
    std: tuple[float, ...] = IMAGENET_STD,
) -> FasterRCNN:
    """A detector of `num_classes` classes (background apart) around the encoder, whose modules it takes over.

    mean, std   of the pixels in [0, 1] that the encoder was trained with
    Raises ValueError for an encoder that is no ResNet of three channels.
    """
    if not isinstance(encoder, ResNet) or encoder.conv1.in_channels != 3:
        raise ValueError(
            f"checkpoint holds a {type(encoder).__name__}, but detection needs a ResNet of RGB images, such as resnet50"
        )
    width = int(encoder.num_features)
    if cfg.norm == "frozen":
        encoder = freeze_norms(encoder)
    norm = FrozenBatchNorm2d if cfg.norm == "frozen" else nn.BatchNorm2d
    before, after, test_before, test_after = cfg.proposals
    build = MaskRCNN if cfg.mask else FasterRCNN
    parts = (_pyramid if cfg.form == "fpn" else _c4)(encoder, cfg, num_classes + 1, width, norm)
    return build(
        min_size=cfg.train_sizes, max_size=cfg.max_size, image_mean=list(mean), image_std=list(std),
        rpn_pre_nms_top_n_train=before, rpn_post_nms_top_n_train=after, rpn_pre_nms_top_n_test=test_before,
        rpn_post_nms_top_n_test=test_after, box_batch_size_per_image=cfg.regions, **parts,
    )  # fmt: skip


def freeze_norms(module: nn.Module) -> nn.Module:
    """The module with every batch norm replaced by one whose statistics and affine part stay as they are."""
    if isinstance(module, nn.BatchNorm2d):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps)
        state = module.state_dict()
        frozen.load_state_dict({key: state[key] for key in ("weight", "bias", "running_mean", "running_var")})
        return frozen
    for name, child in module.named_children():
        setattr(module, name, freeze_norms(child))
    return module


class Trunk(nn.Module):
    """The encoder up to stage 3, (B, 3, H, W) -> (B, D / 2, H / stride, W / stride); what C4 proposes regions on."""

    def __init__(self, encoder: ResNet, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = encoder.conv1, encoder.bn1, encoder.relu, encoder.maxpool
        self.layer1, self.layer2, self.layer3 = encoder.layer1, encoder.layer2, encoder.layer3
        self.out_channels = width // 2

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer3(self.layer2(self.layer1(x)))


class Stage4(nn.Module):
    """Stage 4 and one more norm on each region: (n, D / 2, S, S) -> (n, D, S / 2, S / 2), or their mean (n, D)."""

    def __init__(self, layer4: nn.Module, norm: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.layer4, self.norm, self.pooled = layer4, norm, pooled

    def forward(self, regions: Tensor) -> Tensor:
        x = self.norm(self.layer4(regions))
        return x.mean((2, 3)) if self.pooled else x


class OneMapAlign(MultiScaleRoIAlign):
    """Regions of one map, with pixels' centres at halves and as many samples as a region asks for (ROIAlign v2)."""

    def __init__(self, side: int, stride: int) -> None:
        super().__init__(["0"], side, 0)
        self.stride = stride

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return roi_align(x["0"], boxes, self.output_size, 1 / self.stride, self.sampling_ratio, aligned=True)


def _pyramid(
    encoder: ResNet, cfg: DetectorConfig, num_labels: int, width: int, norm: Callable[..., nn.Module]
) -> dict[str, object]:
    channels = [width // 8, width // 4, width // 2, width]
    levels = {name: str(level) for level, name in enumerate(STAGES)}
    backbone = BackboneWithFPN(encoder, levels, channels, cfg.channels, norm_layer=norm)
    anchors = AnchorGenerator(tuple((side,) for side in cfg.anchors), (RATIOS,) * len(cfg.anchors))
    head = FastRCNNConvFCHead((cfg.channels, 7, 7), [cfg.channels] * 4, [4 * cfg.channels], norm_layer=norm)
    parts: dict[str, object] = {
        "backbone": backbone,
        "rpn_anchor_generator": anchors,
        "rpn_head": RPNHead(cfg.channels, len(RATIOS), conv_depth=2),
        "box_head": head,
        "box_predictor": FastRCNNPredictor(4 * cfg.channels, num_labels),
    }
    return parts | ({"mask_predictor": MaskRCNNPredictor(256, 256, num_labels)} if cfg.mask else {})


def _c4(
    encoder: ResNet, cfg: DetectorConfig, num_labels: int, width: int, norm: Callable[..., nn.Module]
) -> dict[str, object]:
    stride = int(encoder.conv1.stride[0]) * (1 if isinstance(encoder.maxpool, nn.Identity) else 2) * 4
    extra = norm(width)
    parts: dict[str, object] = {
        "backbone": Trunk(encoder, width),
        "rpn_anchor_generator": AnchorGenerator((cfg.anchors,), (RATIOS,)),
        "box_roi_pool": OneMapAlign(14, stride),
        "box_head": Stage4(encoder.layer4, extra, pooled=True),
        "box_predictor": FastRCNNPredictor(width, num_labels),
    }
    masks: dict[str, object] = {
        "mask_roi_pool": OneMapAlign(14, stride),
        "mask_head": Stage4(encoder.layer4, extra, pooled=False),
        "mask_predictor": MaskRCNNPredictor(width, 256, num_labels),
    }
    return parts | (masks if cfg.mask else {})


@torch.no_grad()
def settle_norms(model: nn.Module, forward: Callable[[], object], num_batches: int) -> None:
    """Replace running statistics by the plain mean over `num_batches` calls of forward() in train mode (PreciseBN).

    And over the ranks, so that all of them test the same detector also where their norms do not share batches.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms or not num_batches:
        return
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = None  # torch's word for a cumulative mean
    model.train()
    for _ in range(num_batches):
        forward()
    for m, momentum in zip(norms, momenta):
        m.momentum = momentum
        for statistic in (m.get_buffer("running_mean"), m.get_buffer("running_var")):
            statistic.copy_(dist.all_reduce_mean(statistic))
