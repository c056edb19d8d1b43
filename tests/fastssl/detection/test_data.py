"""Pictures of VOC's and COCO's layouts, mirrored pictures, and which of them make a step."""

import json

import numpy as np
import pytest
import torch

from fastssl.detection.data import TrainingPictures, batches, load_image, read_pictures
from fastssl.detection.settings import DetectionData
from tests.fastssl.detection.shapes import KINDS, write_coco, write_voc
from tests.voc import annotation


def data(root, form, parts):
    return DetectionData(str(root), form, tuple(parts), tuple(parts))


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path / "coco", {"train2017": 5, "val2017": 3})


@pytest.fixture
def voc(tmp_path):
    return write_voc(tmp_path / "voc", {"trainval": 5, "test": 3})


def colour(picture, box):
    """The mean colour, in [0, 1], of the middle of a box."""
    image = load_image(picture)
    x, y = int((box[0] + box[2]) / 2), int((box[1] + box[3]) / 2)
    return image[:, y - 1 : y + 2, x - 1 : x + 2].mean((1, 2))


def test_boxes_and_labels_of_both_layouts_are_where_the_shapes_are(coco, voc):
    for root, form, part, names in (
        (coco, "coco", "train2017", ["sheep", "dog"]),
        (voc, "voc", "VOC2007/trainval", []),
    ):
        found = read_pictures(data(root, form, [part]), [part])
        if names:
            assert list(found.classes) == names
        assert len(found.items) == 5
        for picture in found.items:
            image = load_image(picture)
            assert image.shape == (3, 64, 64)
            for box, label in zip(picture.boxes, picture.labels, strict=True):
                kind = [name for name, _ in KINDS].index(found.classes[label - 1])
                assert torch.allclose(colour(picture, box), torch.tensor(KINDS[kind][1]) / 255, atol=0.1)
                edge = image[:, int((box[1] + box[3]) / 2), int(box[2]) - 2]  # two px inside the far side
                assert (edge - torch.tensor(KINDS[kind][1]) / 255).abs().max() < 0.35


def test_both_layouts_give_the_same_boxes_of_the_same_shapes(tmp_path):
    coco = write_coco(tmp_path / "coco", {"one": 4}, seed=7)
    voc = write_voc(tmp_path / "voc", {"one": 4}, seed=7)
    a, b = (read_pictures(data(root, form, [part]), [part]) for root, form, part in
            ((coco, "coco", "one"), (voc, "voc", "VOC2007/one")))  # fmt: skip
    assert [p.boxes for p in a.items] == [p.boxes for p in b.items]
    assert [p.size for p in a.items] == [p.size for p in b.items]


def test_difficult_and_crowd_boxes_are_kept_apart_and_not_trained_on(coco, voc):
    (voc / "VOC2007/Annotations/000000.xml").write_text(
        annotation((64, 64), [("dog", (1, 1, 9, 9), True, False), ("dog", (3, 3, 9, 9), False, False)])
    )
    (voc / "VOC2007/Annotations/000001.xml").write_text(annotation((64, 64), [("dog", (1, 1, 9, 9), True, False)]))
    found = read_pictures(data(voc, "voc", ["VOC2007/trainval"]), ["VOC2007/trainval"])
    assert found.items[0].difficult == (True, False)
    assert [p.path.name for p in found.to_train_on().items] == [f"00000{i}.jpg" for i in (0, 2, 3, 4)]
    _, target = TrainingPictures(found, 0, masks=False)[(1, 0)]
    assert len(target["boxes"]) == len(target["labels"]) == 1
    path = coco / "annotations/instances_train2017.json"
    document = json.loads(path.read_text())
    document["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(document))
    assert read_pictures(data(coco, "coco", ["train2017"]), ["train2017"]).items[0].difficult == (True, False)


def test_parts_are_joined_and_their_digest_knows_every_box(voc):
    parts = ["VOC2007/trainval", "VOC2007/test"]
    both = read_pictures(data(voc, "voc", parts), parts)
    assert len(both.items) == 8
    (voc / "VOC2007/Annotations/000000.xml").write_text(annotation((64, 64), [("dog", (1, 1, 9, 9), False, False)]))
    assert read_pictures(data(voc, "voc", parts), parts).digest != both.digest


def test_a_mirrored_picture_keeps_its_shapes_in_its_boxes_and_masks(coco):
    found = read_pictures(data(coco, "coco", ["train2017"]), ["train2017"])
    pictures, mirrored = TrainingPictures(found, 3, masks=True), 0
    for position in range(12):
        image, target = pictures[(position, position % 5)]
        plain = load_image(found.items[position % 5])
        mirrored += not torch.equal(image, plain)
        assert torch.equal(image, plain) or torch.equal(image, plain.flip(2))
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            left, top, right, bottom = box.int().tolist()
            assert torch.equal(mask.nonzero().amin(0), torch.tensor([top, left]))
            assert torch.equal(mask.nonzero().amax(0) + 1, torch.tensor([bottom, right]))
            kind = [name for name, _ in KINDS].index(found.classes[label - 1])
            middle = image[:, (top + bottom) // 2, (left + right) // 2]
            assert torch.allclose(middle, torch.tensor(KINDS[kind][1]) / 255, atol=0.02)
        again, _ = pictures[(position, position % 5)]
        assert torch.equal(image, again)
    assert 0 < mirrored < 12


@pytest.mark.parametrize("world", [1, 2])
def test_every_epoch_has_every_picture_once_and_ranks_share_the_steps(coco, monkeypatch, world):
    from fastssl import dist

    found = read_pictures(data(coco, "coco", ["train2017"]), ["train2017"])
    monkeypatch.setattr(dist, "world", lambda: world)
    seen = {}
    for rank in range(world):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        for step, samples in enumerate(batches(found, range(5), 2, seed=1, workers=0, masks=False)):
            seen.setdefault(step, []).extend(samples)
    boxes = [tuple(target["boxes"].flatten().tolist()) for step in range(5) for _, target in seen[step]]
    assert len(boxes) == 10
    widths = [sorted((b[2] - b[0], b[3] - b[1]) for b in np.reshape(one, (-1, 4))) for one in boxes]
    assert sorted(widths[:5]) == sorted(widths[5:])


def test_a_later_start_continues_the_same_order(coco):
    found = read_pictures(data(coco, "coco", ["train2017"]), ["train2017"])
    whole = list(batches(found, range(6), 2, seed=1, workers=0, masks=False))
    rest = list(batches(found, range(3, 6), 2, seed=1, workers=0, masks=False))
    for one, other in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["images"][0].update(file_name="../../etc/passwd"), "leaves the folder"),
        (lambda d: d.pop("categories"), "no COCO file of instances"),
        (lambda d: d["annotations"][0].update(image_id=5), "no COCO file of instances"),
        (lambda d: d["annotations"][0].update(category_id=99), "no COCO file of instances"),
    ],
)
def test_a_bad_coco_file_is_refused_in_one_sentence(coco, change, message):
    path = coco / "annotations/instances_train2017.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message):
        read_pictures(data(coco, "coco", ["train2017"]), ["train2017"])
    with pytest.raises(ValueError, match="cannot be read"):
        read_pictures(data(coco, "coco", ["train2018"]), ["train2018"])
