"""Detection metrics: VOC's rule by hand and by the devkit's loop, COCO's against pycocotools."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest

from fastssl.detection.data import Picture, Pictures
from fastssl.detection.metrics import coco_ap, overlap, summary, voc_ap
from tests.oracle import average_precision as oracle


def truth_of(*images, classes=("dog", "cat")):
    """Images as lists of (box, label, difficult)."""
    items = [
        Picture(Path(f"{row}.jpg"), row, tuple(b for b, _, _ in boxes), tuple(w for _, w, _ in boxes),
                tuple(d for _, _, d in boxes), size=(100, 100))
        for row, boxes in enumerate(images)
    ]  # fmt: skip
    return Pictures(tuple(classes), tuple(items))


def detection(row, box, score, label=1):
    return {"image": row, "box": list(box), "score": score, "label": label}


def test_overlap_is_intersection_over_union():
    a, b = np.array([[0, 0, 10, 10.0]]), np.array([[5, 0, 15, 10], [10, 0, 20, 10], [0, 0, 10, 10.0]])
    assert overlap(a, b).tolist() == [[50 / 150, 0.0, 1.0]]


def test_a_second_detection_of_a_box_is_wrong_and_one_of_a_difficult_box_does_not_count():
    truth = truth_of([((0, 0, 10, 10), 1, False), ((50, 50, 60, 60), 1, True)])
    found = [detection(0, (0, 0, 10, 10), 0.9), detection(0, (0, 0, 10, 9), 0.8), detection(0, (50, 50, 60, 60), 0.95)]
    (aps,) = voc_ap(found, truth)
    assert list(aps) == ["dog"]  # no cat anywhere
    assert aps["dog"].area == 1.0
    truth = truth_of([((0, 0, 10, 10), 1, False), ((30, 30, 40, 40), 1, False)])
    (aps,) = voc_ap([*found[:2], detection(0, (30, 30, 40, 40), 0.1)], truth)
    assert aps["dog"].area == pytest.approx((1 + 2 / 3) / 2)  # right, wrong, right


def test_an_overlap_of_exactly_the_least_counts():
    truth = truth_of([((0, 0, 10, 10), 1, False)])
    for box, expected in (((0, 0, 10, 5), 1.0), ((0, 0, 10, 4.9), 0.0)):
        (aps,) = voc_ap([detection(0, box, 0.5)], truth)
        assert aps["dog"].area == expected


def scene(rng, num=25):
    """Random true boxes, and detections near some of them."""
    images, found = [], []
    for row in range(num):
        boxes = []
        for _ in range(int(rng.integers(1, 5))):
            left, top, width, height = rng.uniform([0, 0, 8, 8], [60, 60, 40, 40])
            boxes.append(((left, top, left + width, top + height), int(rng.integers(1, 3)), bool(rng.random() < 0.15)))
        images.append(boxes)
        for box, label, _ in boxes:
            for _ in range(int(rng.integers(0, 3))):
                moved = np.array(box) + rng.normal(size=4) * 1.5
                found.append(detection(row, moved.tolist(), float(rng.random()), label))
        found.append(detection(row, (1, 1, 20, 20), float(rng.random()), 1))
    return found, truth_of(*images)


def devkit_loop(found, truth, label, least):
    """(scores, right or wrong) in the order of score, difficult ones left out; and the number of positives."""
    open_boxes = {}
    for row, p in enumerate(truth.items):
        for number, (box, w, difficult) in enumerate(zip(p.boxes, p.labels, p.difficult)):
            if w == label:
                open_boxes[row, number] = [box, difficult, False]
    scores, right = [], []
    for d in sorted((d for d in found if d["label"] == label), key=lambda d: -d["score"]):
        best, best_overlap = None, -1.0
        for (row, _), entry in open_boxes.items():
            if row != d["image"]:
                continue
            a, b = d["box"], entry[0]
            w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            inside = max(w, 0) * max(h, 0)
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
            if inside / union > best_overlap:
                best, best_overlap = entry, inside / union
        if best is None or best_overlap < least:
            scores.append(d["score"])
            right.append(False)
        elif not best[1]:
            scores.append(d["score"])
            right.append(not best[2])
            best[2] = True
    return scores, right, sum(not entry[1] for entry in open_boxes.values())


@pytest.mark.parametrize("least", [0.5, 0.75])
def test_vocs_ap_is_that_of_the_devkits_loop(rng, least):
    found, truth = scene(rng)
    (aps,) = voc_ap(found, truth, (least,))
    for label, name in ((1, "dog"), (2, "cat")):
        points = oracle.curve(*devkit_loop(found, truth, label, least))
        assert 0.05 < aps[name].area < 0.95
        assert aps[name].area == pytest.approx(oracle.area(points), rel=1e-12)
        assert aps[name].eleven_point == pytest.approx(oracle.eleven_point(points), rel=1e-12)


def test_cocos_ap_is_that_of_pycocotools(rng):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found, truth = scene(rng)
    annotations = [
        {"id": 1000 * row + i + 1, "image_id": row, "category_id": p.labels[i], "iscrowd": int(p.difficult[i]),
         "bbox": [b[0], b[1], b[2] - b[0], b[3] - b[1]], "area": (b[2] - b[0]) * (b[3] - b[1])}
        for row, p in enumerate(truth.items) for i, b in enumerate(p.boxes)
    ]  # fmt: skip
    results = [
        {"image_id": d["image"], "category_id": d["label"], "score": d["score"],
         "bbox": [d["box"][0], d["box"][1], d["box"][2] - d["box"][0], d["box"][3] - d["box"][1]]}
        for d in found
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = {
            "images": [{"id": row, "width": 100, "height": 100} for row in range(len(truth.items))],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        }
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    expected = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), evaluation.stats[:6]))
    assert coco_ap(found, truth) == pytest.approx(expected, abs=1e-9)
    assert 0.1 < expected["AP"] < 0.9


def test_no_detections_are_an_ap_of_zero(rng):
    _, truth = scene(rng)
    metrics = summary([], truth, masks=False)
    assert len(metrics) == 12
    assert set(metrics.values()) == {0.0}


def test_true_boxes_as_detections_are_an_ap_of_one(rng):
    _, truth = scene(rng)
    found = [detection(row, b, 0.9, w) for row, p in enumerate(truth.items) for b, w in zip(p.boxes, p.labels)]
    metrics = summary(found, truth, masks=False)
    assert {key: metrics[f"detection/{key}"] for key in ("coco_ap", "voc_ap", "voc_ap50_11point")} == pytest.approx(
        {"coco_ap": 1.0, "voc_ap": 1.0, "voc_ap50_11point": 1.0}
    )
