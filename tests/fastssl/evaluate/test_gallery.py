"""Sheets of pictures: the stored pixels, in their places, for photographs and for stamps."""

import numpy as np
import pytest
from PIL import Image

from fastssl.evaluate.gallery import (
    CELL_PX,
    GAP_PX,
    LABEL_PX,
    LINE_PX,
    TITLE_PX,
    Cell,
    Row,
    class_of,
    draw_sheet,
    shortened,
    thumbnails,
)
from fastssl.stamp_pictures import picture, scale_of
from shard_tools.manifest import Manifest
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import hdf5
from tests.shards import encode, write_split


@pytest.fixture
def split(tmp_path):
    """A 30 x 20 px image of one colour a pixel, and a 400 x 100 px one, with labels."""
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    large = Image.new("RGB", (400, 100), (10, 200, 30))
    return small, write_split(tmp_path, [("png", encode(small, "png")), ("png", encode(large, "png"))], [1, 0])


def test_small_images_are_enlarged_by_a_whole_factor_and_large_ones_shrunk(split):
    small, manifest = split
    one, other = thumbnails(manifest, [0, 1])
    assert one.size == (90, 60)  # three times, since four times would be 120 px wide
    np.testing.assert_array_equal(np.asarray(one), np.asarray(small).repeat(3, 0).repeat(3, 1))
    assert other.size == (CELL_PX, CELL_PX // 4)
    assert np.asarray(other).reshape(-1, 3).tolist() == [[10, 200, 30]] * (CELL_PX * CELL_PX // 4)


def test_every_cell_stands_in_its_row_and_column(split):
    colours = [Image.new("RGB", (CELL_PX, CELL_PX), c) for c in ("#ff0000", "#00ff00", "#0000ff")]
    rows = [
        Row(("first",), (Cell(colours[0], ("one", "two")), Cell(colours[1]))),
        Row(("second",), (Cell(colours[2]),)),
    ]
    sheet = draw_sheet(rows, "title")
    second = TITLE_PX + CELL_PX + 2 * LINE_PX + GAP_PX  # under the two lines of the first row
    middle = CELL_PX // 2
    assert sheet.getpixel((LABEL_PX + middle, TITLE_PX + middle)) == (255, 0, 0)
    assert sheet.getpixel((LABEL_PX + CELL_PX + GAP_PX + middle, TITLE_PX + middle)) == (0, 255, 0)
    assert sheet.getpixel((LABEL_PX, second)) == (0, 0, 255)
    assert sheet.getpixel((LABEL_PX, second - 1)) == (255, 255, 255)
    below = np.asarray(sheet)[TITLE_PX + CELL_PX : second - GAP_PX, LABEL_PX : LABEL_PX + CELL_PX]
    assert (below < 100).any()  # the lines of text
    assert sheet.height == second + CELL_PX + GAP_PX


def test_stamps_are_drawn_by_their_bands(tmp_path):
    h5py = pytest.importorskip("h5py")
    stamps = np.random.default_rng(1).gamma(1.0, 2.0, (3, 5, 24, 24)).astype(np.float32)
    with h5py.File(tmp_path / "train.h5", "w") as file:
        file["images"] = stamps
    pack(hdf5.open_source(tmp_path / "train.h5", "train", "images"), tmp_path / "shards", PackOptions(workers=1))
    manifest = Manifest.load(tmp_path / "shards")
    expected = [np.asarray(picture(stamp, scale_of(stamp)).resize((96, 96), 0)) for stamp in stamps]
    found = [np.asarray(image) for image in thumbnails(manifest, [0, 1, 2])]
    for image in found:  # packing shuffled them
        assert any(np.array_equal(image, other) for other in expected)
    assert len({image.tobytes() for image in found}) == 3


def test_names_of_classes_and_long_texts(split, tiny_shards_unlabelled):
    manifest = split[1]
    assert [class_of(manifest, i) for i in (0, 1)] == ["class 1", "class 0"]
    assert class_of(Manifest.load(tiny_shards_unlabelled), 0) == ""
    assert shortened("a name of 18 chars") == "a name of 18 chars"
    assert shortened("a name of 19 chars!") == "a name of 19 char…"
