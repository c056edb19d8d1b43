import re

import numpy as np
import pytest
from PIL import Image

from fastssl import config
from fastssl.show_views import draw_grid, main, render, run
from pipelines.loader import Loader
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest

SMALL = ["views.query.size=48", "run.batch_size=20", "run.seed=5"]


def test_the_views_are_the_pixels_that_training_sees_at_that_epoch(tiny_shards):
    manifest, cfg = Manifest.load(tiny_shards), config.load([*SMALL, f"data.root={tiny_shards}"])
    specs = cfg.view_specs()
    with Loader(manifest, specs, batch_size=20, seed=5, backend="exact", threads=1) as loader:
        batch = next(iter(loader.batches(start_step=2 * loader.steps_per_epoch)))
    ids = batch.ids.tolist()[:4]
    rendered = render(manifest, specs, ids, epoch=2, seed=5, backend="exact")
    for view, role in enumerate(("query", "key")):
        shown = np.stack([np.asarray(image) for image in rendered.views[view]])
        assert np.array_equal(shown, batch.views[role][0][:4].permute(0, 2, 3, 1).numpy())
    other = render(manifest, specs, ids, epoch=3, seed=5, backend="exact")
    assert not np.array_equal(np.asarray(other.views[0][0]), np.asarray(rendered.views[0][0]))


def test_the_grid_shows_every_view_pixel_by_pixel_below_its_title(tiny_shards):
    specs = [ViewSpec("wide", 120, count=2), ViewSpec("small", 60, count=3)]
    rendered = render(Manifest.load(tiny_shards), specs, [3, 0], epoch=0, seed=0, backend="exact")
    grid = np.asarray(draw_grid(rendered, ["three", "zero"]))
    assert len(rendered.views) == 5
    for images in rendered.views:
        for image in images:
            pixels = np.asarray(image)
            side = len(pixels)
            windows = np.lib.stride_tricks.sliding_window_view(grid[..., 0], (side, side))
            places = np.argwhere((windows[:, :, 0] == pixels[0, :, 0]).all(axis=2))
            assert any((grid[y : y + side, x : x + side] == pixels).all() for y, x in places)


def test_small_views_are_enlarged_by_whole_pixels(tiny_shards):
    rendered = render(Manifest.load(tiny_shards), [ViewSpec("query", 32)], [0], epoch=0, seed=0, backend="exact")
    grid = np.asarray(draw_grid(rendered, ["0"]))
    enlarged = np.asarray(rendered.views[0][0]).repeat(4, axis=0).repeat(4, axis=1)
    assert any((grid[y : y + 128, -136:-8] == enlarged).all() for y in range(len(grid) - 127))


def test_the_command_writes_the_picture_and_takes_training_settings(tiny_shards, tmp_path):
    out = tmp_path / "pictures" / "grid.png"
    written = run([*SMALL, f"data.root={tiny_shards}", "views.ids=[0,60]", "views.epoch=7", f"views.out={out}"])
    assert written == out
    with Image.open(out) as picture:
        assert picture.width > 3 * 112
        assert picture.height > 2 * 112


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["views.ids=[61]"], "views.ids holds 61, but the samples of .* are 0 to 60"),
        (["views.ids=[-1]"], r"views\.ids is \[-1\]"),
        (["views.ids=all"], r"views\.ids is 'all'"),
        (["views.epoch=soon"], r"views\.epoch is 'soon'"),
        (["views.out=grid.txt"], r"views\.out is 'grid\.txt'.*\.png"),
        (["views.querry.size=32"], r"views\.querry"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(overrides, message, tiny_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, f"data.root={tiny_shards}", *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []
