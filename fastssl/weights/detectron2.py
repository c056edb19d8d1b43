"""Exports for detectron2: a backbone under its names in the pickle that it reads, and the configs of MoCo's transfer.

detectron2's DetectionCheckpointer matches names by their ends where `matching_heuristics` is set, so that one file
serves C4 and FPN models. The pickle is written here and never read.
"""

from __future__ import annotations

import json
import pickle
import re

from fastssl.weights.read import COUNTER
from fastssl.weights.source import Source, resnet_name
from fastssl.weights.state_dicts import tensors

DEPTHS = {"resnet50": 50, "resnet101": 101, "resnet152": 152}


def detectron2_file(source: Source) -> bytes:
    """float32 arrays by name: 265 of them for a ResNet-50, without the counters of batch norm."""
    resnet_name(source, "detectron2")
    state = {key: value for key, value in tensors(source).items() if not key.endswith(COUNTER)}
    model = {detectron2_name(key): value.numpy() for key, value in state.items()}
    return pickle.dumps({"model": model, "__author__": "fastssl", "matching_heuristics": True}, protocol=4)


def detectron2_name(key: str) -> str:
    """Of torchvision's: bn1.bias -> stem.conv1.norm.bias, layer2.0.downsample.0.weight -> res3.0.shortcut.weight."""
    head, *rest = key.split(".")
    name = ".".join(rest)
    if head.startswith("layer"):
        stage = f"res{int(head.removeprefix('layer')) + 1}"
    else:
        stage, name = "stem", key
    name = name.replace("downsample.0.", "shortcut.").replace("downsample.1.", "shortcut.norm.")
    return stage + "." + re.sub(r"\bbn(\d)\.", r"conv\1.norm.", name)


def detectron2_configs(source: Source, weights: str) -> dict[str, str]:
    """The C4 configs of MoCo's transfer to VOC and COCO (arXiv:1911.05722, section 4.2), {"voc": text, "coco": text}.

    weights     the exported file, as the configs shall name it
    Raises ValueError for ResNet-18 and 34, of whose blocks detectron2 builds no C4 head.
    """
    depth = DEPTHS[resnet_name(source, "detectron2 --with-config", tuple(DEPTHS))]
    augment = source.view.augment
    mean, std = ([round(255 * value, 4) for value in values] for values in (augment.mean, augment.std))
    return {
        name: CONFIG.format(weights=json.dumps(weights), depth=depth, mean=mean, std=std, **values)
        for name, values in TRANSFERS.items()
    }


TRANSFERS = {
    "voc": {
        "what": "VOC: trained on trainval of 2007 and 2012, tested on 2007",
        "classes": 20, "masks": "false", "short_sides": list(range(480, 801, 32)),
        "train": '["voc_2007_trainval", "voc_2012_trainval"]', "test": '["voc_2007_test"]',
        "steps": [18000, 22000], "last": 24000, "warmup": 100,
    },
    "coco": {
        "what": "COCO, with masks, the schedule that detectron2 calls 2x",
        "classes": 80, "masks": "true", "short_sides": list(range(640, 801, 32)),
        "train": '["coco_2017_train"]', "test": '["coco_2017_val"]',
        "steps": [120000, 160000], "last": 180000, "warmup": 1000,
    },
}  # fmt: skip

CONFIG = """\
# {what}: Faster or Mask R-CNN on C4, 16 images a step over all GPUs.
# Res5ROIHeadsExtraNorm is detectron2's Res5ROIHeads with one more batch norm after res5, as MoCo's authors train it.
# Register a class of that name, or write Res5ROIHeads to do without it.
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  WEIGHTS: {weights}
  MASK_ON: {masks}
  PIXEL_MEAN: {mean}
  PIXEL_STD: {std}
  BACKBONE: {{FREEZE_AT: 0}}
  RESNETS: {{DEPTH: {depth}, NORM: SyncBN, STRIDE_IN_1X1: false}}
  RPN: {{PRE_NMS_TOPK_TEST: 6000, POST_NMS_TOPK_TEST: 1000}}
  ROI_HEADS: {{NAME: Res5ROIHeadsExtraNorm, NUM_CLASSES: {classes}}}
INPUT: {{FORMAT: RGB, MIN_SIZE_TRAIN: {short_sides}, MIN_SIZE_TEST: 800}}
DATASETS: {{TRAIN: {train}, TEST: {test}}}
SOLVER: {{IMS_PER_BATCH: 16, BASE_LR: 0.02, STEPS: {steps}, MAX_ITER: {last}, WARMUP_ITERS: {warmup}}}
TEST:
  PRECISE_BN: {{ENABLED: true}}
VERSION: 2
"""
