import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from fastssl import config
from fastssl.show_views import CELL_PX, draw_grid, main, render, run
from pipelines import strong
from pipelines.augment import AugmentSpec
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
    specs = [
        ViewSpec("wide", 120, count=2),
        ViewSpec("small", 60, count=3),
        ViewSpec("strong", 120, augment=AugmentSpec(strong_draws=5)),
    ]
    rendered = render(Manifest.load(tiny_shards), specs, [3, 0], epoch=0, seed=0, backend="exact")
    grid = np.asarray(draw_grid(rendered, ["three", "zero"]))
    assert len(rendered.views) == 6
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


@pytest.fixture
def written(monkeypatch) -> list[tuple[float, float, str]]:
    """(left, top, text) of what is written into pictures."""
    texts: list[tuple[float, float, str]] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, *a, **b: texts.append((*xy, text)))
    return texts


def test_views_are_numbered_through_all_sizes_of_their_role(tiny_shards, written):
    specs = [ViewSpec("key", 32), *(ViewSpec("strong", size, count=count) for size, count in ((32, 1), (24, 2)))]
    draw_grid(render(Manifest.load(tiny_shards), specs, [0], epoch=0, seed=0, backend="exact"), ["0"])
    titles = [text for _, _, text in written if text.startswith(("key", "strong"))]
    assert titles == ["key", "strong 1", "strong 2", "strong 3"]


def test_the_strong_operations_of_a_view_stand_below_it_in_their_order(tiny_shards, written):
    specs = [ViewSpec("query", 120), ViewSpec("strong", 120, augment=AugmentSpec(strong_draws=5))]
    rendered = render(Manifest.load(tiny_shards), specs, [0, 1], epoch=0, seed=0, backend="exact")
    draws = [("shear_x", 2, -1), ("solarize", 5, 1), ("rotate", 4, -1), None, ("equalize", 9, 1)]
    draws += [("posterize", 9, 1), ("brightness", 1, 1), ("translate_y", 9, -1), ("identity", 1, 1), None]
    numbers = np.array([(strong.POOL.index(d[0]), *d[1:]) if d else (-1, 1, 1) for d in draws], np.int8)
    operation, level, sign = numbers.reshape(2, 5, 3).transpose(2, 0, 1)
    drawn = replace(rendered.draws[1], strong_operation=operation, strong_level=level, strong_sign=sign)
    rendered = replace(rendered, draws=[rendered.draws[0], drawn])
    picture = draw_grid(rendered, ["0", "1"])
    (left,) = {left for left, _, text in written if text == "strong"}
    below = [(top, text) for x, top, text in written if x == left and text not in ("strong", "120 px")]
    assert [text for _, text in below] == [
        "shear x -0.06", "solarize 128", "rotate -12°", "equalize",
        "posterize 7 bits", "brightness 0.14", "translate y -32 px", "identity",
    ]  # fmt: skip
    tops = [top for top, _ in below]
    first, second = 34 + 120, 34 + 120 + 4 * 14 + 8 + 120  # title, view, four lines, gap
    assert tops == [*range(first, first + 4 * 14, 14), *range(second, second + 4 * 14, 14)]
    assert picture.height >= second + 4 * 14


@pytest.mark.parametrize("name", strong.POOL)
def test_a_strong_operation_fits_below_the_smallest_view(name, tiny_shards, written):
    specs = [ViewSpec("key", 224), ViewSpec("strong", 96, augment=AugmentSpec(strong_draws=1))]
    rendered = render(Manifest.load(tiny_shards), specs, [0], epoch=0, seed=0, backend="exact")
    operation = np.array([[strong.POOL.index(name)]], np.int8)
    drawn = replace(rendered.draws[1], strong_operation=operation, strong_level=np.array([[9]], np.int8))
    draw_grid(replace(rendered, draws=[rendered.draws[0], drawn]), ["0"])
    assert written[-1][2].startswith(name.replace("_", " "))
    assert ImageFont.load_default(12).getlength(written[-1][2]) <= CELL_PX


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
