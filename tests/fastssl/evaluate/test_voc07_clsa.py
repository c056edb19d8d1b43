"""CLSA's own VOC07 protocol: its odd mAP, its learning rates, its pictures, and the command."""

import io
import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from sklearn.metrics import average_precision_score

from fastssl.evaluate import main as evaluate
from fastssl.evaluate.settings import load
from fastssl.evaluate.voc07_clsa import MEAN, STD, ClsaSettings, evaluation_pictures, map_over_images, training_picture
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import voc07 as source
from tests.oracle import average_precision as oracle
from tests.shard_tools.builders import jpeg
from tests.voc import devkit


def test_their_map_is_the_mean_over_images_of_scikit_learns_ap(rng):
    present = rng.random((50, 20)) < 0.1
    present[:3] = False
    scores = rng.normal(size=present.shape)
    expected = [average_precision_score(p, s) if p.any() else 0.0 for p, s in zip(present, scores)]
    assert map_over_images(scores, present) == pytest.approx(np.mean(expected), rel=1e-13)


def test_the_learning_rate_swings_as_the_authors_scheduler_does():
    settings = ClsaSettings("voc07_clsa")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=12)
    theirs = []
    for _ in range(100):
        optimizer.step()
        scheduler.step()  # before the epoch
        theirs.append(optimizer.param_groups[0]["lr"])
    assert_allclose([settings.lr_at(epoch) for epoch in range(100)], theirs, atol=1e-12)
    assert [round(settings.lr_at(e), 4) for e in (0, 11, 23, 99)] == [0.0491, 0.0, 0.05, 0.0375]


def test_test_pictures_are_four_corners_and_the_centre_of_the_resized_image():
    payload = jpeg(3, (60, 40))
    five = evaluation_pictures(payload, 30, 36, five=True)
    image = Image.open(io.BytesIO(payload)).convert("RGB").resize((54, 36), Image.Resampling.BILINEAR)
    expected = (np.asarray(image) / 255 - MEAN) / STD
    for crop, (left, top) in zip(five, [(0, 0), (24, 0), (0, 6), (24, 6), (12, 3)], strict=True):
        assert_allclose(crop.permute(1, 2, 0), expected[top : top + 30, left : left + 30], atol=1e-5)
    assert torch.equal(evaluation_pictures(payload, 30, 36, five=False)[0], five[4])


def test_training_pictures_are_a_function_of_their_draw_and_show_each_operation():
    payload, grey, plain = jpeg(3, (60, 40)), 0, []
    again = [training_picture(payload, 30, np.random.default_rng(seed)) for seed in (1, 1)]
    assert torch.equal(*again)
    for seed in range(200):
        picture = training_picture(payload, 30, np.random.default_rng(seed))
        assert picture.shape == (3, 30, 30)
        pixels = picture * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
        grey += bool((pixels.amax(0) - pixels.amin(0)).max() < 1e-3)
        plain.append(pixels[:, 13:17, 13:17].mean().item())  # the centre, where turning and flipping change little
    assert 10 <= grey <= 45  # 1/8 of 200
    assert np.std(plain) > 0.02  # brightness


@pytest.fixture(scope="module")
def voc_shards(tmp_path_factory):
    src = devkit(tmp_path_factory.mktemp("voc") / "VOC2007", train=20, val=10, test=40)
    dst = tmp_path_factory.mktemp("voc_shards")
    for split in ("train", "val", "test"):
        pack(source.open_source(src, split), dst, PackOptions())
    return dst


def command(shards, *more):
    small = ["evaluator.epochs=3", "evaluator.lr=0.002", "evaluator.size=24", "evaluator.resize=28", "run.device=cpu"]
    encoder = ["encoder=resnet10_narrow", "encoder.width=0.25"]
    return ["evaluator=voc07_clsa", "checkpoint=random", *encoder, *small, f"data.root={shards}", *more]


def test_the_command_trains_chooses_on_val_and_reports_both_means(voc_shards, tmp_path):
    metrics = evaluate.run(load(command(voc_shards, f"eval.out={tmp_path}/clsa.json")))
    result = json.loads((tmp_path / "clsa.json").read_text())
    assert result["losses"][-1] < result["losses"][0]
    assert metrics["voc07_clsa/val_map_over_images"] == max(result["val_map_over_images"])
    assert result["best_epoch"] == 1 + int(np.argmax(result["val_map_over_images"]))
    assert 0 < metrics["voc07_clsa/map_11point"] < 1
    assert metrics["voc07_clsa/map"] != metrics["voc07_clsa/map_over_images"]
    again = evaluate.run(load(command(voc_shards, f"eval.out={tmp_path}/again.json")))
    assert again == metrics


def test_the_class_means_are_vocs_and_the_subject_keeps_its_statistics(voc_shards, monkeypatch, tmp_path):
    from fastssl.evaluate import voc07_clsa

    seen = []
    real, load_subject = voc07_clsa._scores, evaluate.load_subject
    monkeypatch.setattr(voc07_clsa, "_scores", lambda *a: (seen.append((a[0][0], real(*a))), seen[-1][1])[1])
    subjects = []
    monkeypatch.setattr(evaluate, "load_subject", lambda cfg: (subjects.append(load_subject(cfg)), subjects[0])[1])
    metrics = evaluate.run(load(command(voc_shards, f"eval.out={tmp_path}/clsa.json")))
    from shard_tools.manifest import Manifest

    drifted, scores = seen[-1]
    labels = Manifest.load(voc_shards, "test").labels()
    areas = []
    for number in range(20):
        kept, truth = oracle.without_difficult(scores[:, number], labels[:, number])
        areas.append(oracle.area(oracle.curve(kept, truth, sum(truth))))
    assert metrics["voc07_clsa/map"] == pytest.approx(np.mean(areas), rel=1e-12)
    assert torch.equal(drifted.conv1.weight, subjects[0].backbone.conv1.weight)
    assert torch.equal(subjects[0].backbone.bn1.running_mean, torch.zeros_like(drifted.bn1.running_mean))
    assert drifted.bn1.running_mean.abs().max() > 0


def test_a_limit_is_refused_and_val_must_be_there(voc_shards):
    with pytest.raises(ValueError, match="trains on whole epochs; leave it at 0"):
        evaluate.run(load(command(voc_shards, "data.limit=5")))
    with pytest.raises(ValueError, match="holds the split 'train', not 'val'"):
        evaluate.run(load(command(voc_shards, f"data.root={voc_shards}/train", f"data.test_root={voc_shards}")))
