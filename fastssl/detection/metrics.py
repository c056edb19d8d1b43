"""How good detections are: COCO's AP by faster-coco-eval, and VOC's AP by the devkit's rule.

A detection: {"image": row, "box": [xmin, ymin, xmax, ymax], "score", "label", and "mask" (run lengths) where there are
masks}. COCO's rule treats difficult (crowd) boxes by the share of the detection inside them, VOC's by plain overlap.
"""

# n detections, m true boxes
from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastssl.detection.data import Pictures, coco_masks
from fastssl.evaluate.average_precision import AveragePrecision, of_ranking

Floats = npt.NDArray[np.float64]
Detection = dict[str, Any]
OVERLAPS = tuple(0.5 + 0.05 * i for i in range(10))


def voc_ap(
    found: Sequence[Detection], truth: Pictures, min_overlaps: Sequence[float] = (0.5,)
) -> list[dict[str, AveragePrecision]]:
    """For each of min_overlaps, the AP of every class that has a box which is not difficult.

    Detections by falling score; each takes the true box it overlaps most. If that is min_overlap or more: a first one
    is right, a second one wrong, of a difficult box neither; with less overlap it is wrong.
    """
    result: list[dict[str, AveragePrecision]] = [{} for _ in min_overlaps]
    for label, name in enumerate(truth.classes, start=1):
        boxes = [np.array([b for b, w in zip(p.boxes, p.labels) if w == label]).reshape(-1, 4) for p in truth.items]
        hard = [[d for d, w in zip(p.difficult, p.labels) if w == label] for p in truth.items]
        num_positives = sum(not d for flags in hard for d in flags)
        if not num_positives:
            continue
        nearest = []
        for detection in sorted((d for d in found if d["label"] == label), key=lambda d: -d["score"]):
            row = detection["image"]
            overlaps = overlap(np.array([detection["box"]]), boxes[row])[0]
            best = int(overlaps.argmax()) if len(overlaps) else -1
            nearest.append((row, best, overlaps[best] if len(overlaps) else 0.0))
        for at, min_overlap in enumerate(min_overlaps):
            taken, hits = set(), []
            for row, best, overlapped in nearest:
                if best < 0 or overlapped < min_overlap:
                    hits.append(False)
                elif not hard[row][best]:
                    hits.append((row, best) not in taken)
                    taken.add((row, best))
            result[at][name] = of_ranking(np.array(hits, bool), num_positives)
    return result


def overlap(a: Floats, b: Floats) -> Floats:
    """(n, m): intersection over union of boxes (n, 4) and (m, 4)."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(2)
    areas = [np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(1) for boxes in (a, b)]
    return inside / np.maximum(areas[0][:, None] + areas[1][None] - inside, 1e-12)


def coco_ap(found: Sequence[Detection], truth: Pictures, kind: str = "bbox") -> dict[str, float]:
    """AP, AP50, AP75, APs, APm, APl as COCO defines them (-1 where there is no such box). kind: bbox or segm.

    Raises ValueError without faster-coco-eval.
    """
    coco_masks()
    from faster_coco_eval import COCO, COCOeval_faster

    categories = [{"id": label, "name": name} for label, name in enumerate(truth.classes, start=1)]
    images = [{"id": row, "width": p.size[0], "height": p.size[1]} for row, p in enumerate(truth.items)]
    annotations: list[dict[str, Any]] = []
    for row, p in enumerate(truth.items):
        for i, (left, top, right, bottom) in enumerate(p.boxes):
            box = [left, top, right - left, bottom - top]
            annotation = {
                "id": len(annotations) + 1, "image_id": row, "category_id": p.labels[i], "bbox": box,
                "area": p.areas[i] if p.areas else box[2] * box[3], "iscrowd": int(p.difficult[i]),
            }  # fmt: skip
            if kind == "segm":
                annotation["segmentation"] = p.segmentations[i]
            annotations.append(annotation)
    if not found:
        return dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 0.0)
    results = []
    for d in found:
        left, top, right, bottom = d["box"]
        result = {"image_id": d["image"], "category_id": d["label"], "score": d["score"]}
        shape = {"segmentation": d["mask"]} if kind == "segm" else {"bbox": [left, top, right - left, bottom - top]}
        results.append(result | shape)
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its table
        known = COCO({"images": images, "annotations": annotations, "categories": categories})
        evaluation = COCOeval_faster(known, known.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), map(float, evaluation.stats[:6]), strict=True))


def summary(found: Sequence[Detection], truth: Pictures, masks: bool) -> dict[str, float]:
    """All metrics by name; VOC's are means over classes, voc_ap over overlaps 0.5 to 0.95 as published VOC tables."""
    metrics = {f"detection/coco_{key.lower()}": value for key, value in coco_ap(found, truth).items()}
    if masks:
        metrics |= {f"detection/mask_{key.lower()}": value for key, value in coco_ap(found, truth, "segm").items()}
    at_overlaps = voc_ap(found, truth, OVERLAPS)
    for form, suffix in (("area", ""), ("eleven_point", "_11point")):
        means = [float(np.mean([getattr(ap, form) for ap in aps.values()])) for aps in at_overlaps]
        metrics[f"detection/voc_ap50{suffix}"] = means[0]
        metrics[f"detection/voc_ap75{suffix}"] = means[5]
        metrics[f"detection/voc_ap{suffix}"] = float(np.mean(means))
    return metrics
