"""The whole road of stamps: shards, training with a decoder, exact resume, evaluation, pictures."""

import dataclasses

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from fastssl import checkpoint, config, show_reconstructions, show_views, train
from fastssl.evaluate import main as evaluate
from fastssl.evaluate.settings import load
from fastssl.log import read_metrics
from fastssl.stamp_pictures import light
from pipelines.augment import AugmentSpec
from pipelines.views import ViewSpec
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import hdf5

NUM, BANDS, SIDE = 24, 2, 20
SMALL = [
    "encoder.channels=2", "encoder.conv.side=12", "encoder.conv.layers=[[4,3,2],[6,3,1]]", "encoder.conv.features=8",
    "method.dim=8", "method.decoder.channels=2", "method.decoder.start=[4,6]", "method.decoder.layers=[[4,3,2]]",
    "data.mean=[0,0]", "data.std=[1,1]", "views.query.size=12", "run.batch_size=8", "run.duration=6steps",
    "run.log_every=2", "run.device=cpu", "run.threads=1", "loader.threads=1", "run.precision=fp32",
    "run.save_every=2steps",
]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Blobs off the centre, on noise around zero, packed from HDF5 as train and test; the label is the row's parity."""
    root, rng = tmp_path_factory.mktemp("galaxies"), np.random.default_rng(5)
    y, x = np.mgrid[:SIDE, :SIDE]
    for split in ("train", "test"):
        places = rng.uniform(6, 14, (NUM, 2))
        blobs = [40 * np.exp(-((y - a) ** 2 + (x - b) ** 2) / 8) for a, b in places]
        pixels = np.stack([rng.normal(size=(BANDS, SIDE, SIDE)) + blob for blob in blobs]).astype(np.float32)
        with h5py.File(root / f"{split}.h5", "w") as file:
            file["images"], file["labels"] = pixels, np.arange(NUM) % 2
        pack(hdf5.open_source(root / f"{split}.h5", split), root / "shards", PackOptions(shard_size=10))
    return root / "shards"


def settings(shards, run_dir, recipe="galaxies_cpu", *more):
    queue = ["method.queue_length=16", "method.split_groups=2"] if recipe == "galaxies_cpu" else []
    return config.load([f"recipe={recipe}", f"data.root={shards}", f"run.dir={run_dir}", *SMALL, *queue, *more])


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trained")
    assert train.run(settings(shards, run_dir)) == 0
    return run_dir


def test_a_run_logs_both_parts_of_the_loss_and_resumes_to_the_same_bits(shards, trained, tmp_path):
    last = read_metrics(trained)[-1]
    weight = settings(shards, trained).method["reconstruction_weight"]
    assert last["loss"] == pytest.approx(last["contrast"] + weight * last["reconstruction"], rel=1e-5)
    assert train.run(settings(shards, tmp_path, "galaxies_cpu", "run.stop_after=3steps")) == 0
    assert train.run(settings(shards, tmp_path)) == 0
    ours, theirs = (torch.load(checkpoint.find(d) / "model.pt", weights_only=True) for d in (tmp_path, trained))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_the_autoencoder_runs_on_the_same_shards(shards, tmp_path):
    assert train.run(settings(shards, tmp_path, "galaxies_cpu_autoencoder")) == 0
    assert read_metrics(tmp_path)[-1]["loss"] < read_metrics(tmp_path)[0]["loss"]


def test_placement_and_knn_see_the_stretched_centre(shards, trained, tmp_path):
    overrides = [f"checkpoint={trained}", f"data.root={shards}", "run.device=cpu", f"eval.out={tmp_path}"]
    metrics = evaluate.run(load(["evaluator=placement", "data.split=test", "evaluator.picture=false", *overrides]))
    assert 0 <= metrics["placement/first"] <= 1
    assert metrics["placement/max"] <= NUM
    assert 0 <= evaluate.run(load(["evaluator=knn", *overrides]))["knn/top1"] <= 1
    pixels = ["evaluator=placement", "checkpoint=pixels", f"like={trained}", "data.split=test"]
    evaluate.run(load([*pixels, "evaluator.picture=false", *overrides[1:]]))


def test_the_monitor_and_the_evaluator_agree_on_stamps(shards, tmp_path):
    assert train.run(settings(shards, tmp_path, "galaxies_cpu", "knn.every=6steps", "knn.k=5")) == 0
    during = read_metrics(tmp_path)[-1]["knn/top1"]
    after = ["evaluator=knn", "evaluator.k=[5]", "evaluator.temperature=[0.1]", f"checkpoint={tmp_path}"]
    assert evaluate.run(load([*after, f"data.root={shards}", "run.device=cpu"]))["knn/top1"] == during


def test_pictures_of_views_and_of_reconstructions(shards, trained, tmp_path):
    drawn = show_reconstructions.run(
        [f"checkpoint={trained}", f"data.root={shards}", "views.ids=[0,3]", f"views.out={tmp_path}/drawn.png"]
    )
    with Image.open(drawn) as picture:
        assert picture.size == (3 * 144 + 4 * 8, 22 + 2 * (144 + 8))
    views = show_views.run(
        ["recipe=galaxies_cpu", f"data.root={shards}", *SMALL, "views.ids=[0,3]", f"views.out={tmp_path}/views.png"]
    )
    with Image.open(views) as picture:
        assert np.asarray(picture).std() > 10


def test_reconstructions_are_in_the_units_of_the_data(shards, trained):
    method, cfg = checkpoint.load_method(trained)
    show = show_views.ShowConfig((0, 1), 0, "x.png")
    from shard_tools.manifest import Manifest

    images, drawn = show_reconstructions.reconstruct(method, cfg, Manifest.load(shards, "test"), show)
    assert images.shape == drawn.shape == (2, BANDS, 12, 12)
    assert 0.1 < torch.isclose(images, torch.tensor(0.1)).float().mean() < 0.5  # the floor: sky below zero
    assert images.max() > 10
    torch.testing.assert_close(method.reconstruct(images.log10()), drawn.log10())


def test_normalisation_and_stretch_are_undone():
    spec = ViewSpec("a", 4, crop="turned", augment=AugmentSpec(stretch="log10", mean=(0.5,), std=(2.0,)))
    pixels = torch.tensor([0.1, 1.0, 250.0]).view(1, 1, 1, 3)
    torch.testing.assert_close(light((pixels.log10() - 0.5) / 2.0, spec), pixels)
    mask = torch.tensor([[[[0.0, 1.0]]]])
    assert torch.equal(light(mask, dataclasses.replace(spec, shows="positive")), mask)


def test_the_outline_of_a_turned_window_is_where_its_pixels_come_from():
    """A bright pixel of the image lies in the view where the outline says that it should."""
    from pipelines.backends import Job, make
    from pipelines.draw import draw_view
    from shard_tools.stamps import encode

    spec = ViewSpec("a", 13, crop="turned", shift_px=3, augment=AugmentSpec(flip_p=0.0, mean=(0.0,), std=(1.0,)))
    side, seen = 25, 0
    for row, column in ((9, 12), (12, 9), (14, 15)):
        stamp = np.zeros((1, side, side), dtype=np.float32)
        stamp[0, row, column] = 1.0
        ids = np.arange(8)
        draws = draw_view(spec, 0, 1, 0, ids, [side] * 8, [side] * 8)
        backend = make("stamps", [spec], 8, device="cpu", threads=1, output="float32", depth=1, bands=1)
        backend.submit(Job([encode(stamp)] * 8, [draws], [""] * 8))
        (views,) = backend.collect()
        backend.close()
        for b, view in enumerate(views[:, 0].numpy()):
            if view.sum() < 0.9:  # outside of this window, or on its edge
                continue
            y, x = (np.indices(view.shape) * view).sum((1, 2)) / view.sum() + 0.5
            a, right, _, down = (np.array(corner) for corner in show_views._turned_corners(draws, b, (side, side)))
            place = a + x / spec.size * (right - a) + y / spec.size * (down - a)
            np.testing.assert_allclose(place, [column + 0.5, row + 0.5], atol=0.35)
            seen += 1
    assert seen > 8


def test_a_method_without_a_decoder_is_refused_by_name(tiny_shards, tmp_path):
    from tests.fastssl.runs import settings as photo_settings

    assert train.run(config.load(photo_settings(tiny_shards, tmp_path, "run.duration=1steps"))) == 0
    with pytest.raises(ValueError, match="is of method moco, which has no decoder"):
        show_reconstructions.run([f"checkpoint={tmp_path}", f"data.root={tiny_shards}", "data.split=train"])
