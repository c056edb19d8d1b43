"""The strong draws in the exact backend: Pillow's own operations, bit for bit, at the published magnitudes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from pipelines import strong
from pipelines.augment import AugmentSpec
from pipelines.backends import Job, make
from pipelines.draw import draw_view
from pipelines.views import ViewSpec
from tests.pipelines import torchvision_chain as chain
from tests.pipelines.torchvision_chain import strong_of
from tests.shards import encode

LEVELS, SIGNS = range(1, 10), (-1, 1)
GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")

Draw = tuple[int, int, int]  # operation, level, sign


def rendered(images: Sequence[Image.Image], draws: Sequence[Sequence[Draw]], *, flip: bool = False) -> list[np.ndarray]:
    """Square images of one size, each after its strong draws and nothing else but, if asked for, the flip."""
    size, num = images[0].width, len(images)
    spec = ViewSpec("strong", size, crop="center", resize=size, augment=AugmentSpec(flip_p=float(flip)))
    sides = np.full(num, size)
    operation, level, sign = np.array(draws, dtype=np.int8).reshape(num, -1, 3).transpose(2, 0, 1)
    drawn = draw_view(spec, 0, 0, 0, np.arange(num), sides, sides)
    drawn = replace(drawn, strong_operation=operation, strong_level=level, strong_sign=sign)
    backend = make("exact", [spec], num, device="cpu", threads=1, output="uint8", depth=1)
    backend.submit(Job([encode(image, "png") for image in images], [drawn], [""] * num))
    (view,) = backend.collect()
    backend.close()
    return list(view.permute(0, 2, 3, 1).numpy())


def one(image: Image.Image, name: str, level: int, sign: int) -> np.ndarray:
    return rendered([image], [[(strong.POOL.index(name), level, sign)]])[0]


def test_magnitudes_are_the_published_ones():
    assert len(strong.POOL) == 14
    assert [strong.enhance_factor(v) for v in LEVELS] == pytest.approx(chain.ENHANCE)
    assert [strong.posterize_bits(v) for v in LEVELS] == list(chain.BITS)
    assert [strong.solarize_threshold(v) for v in LEVELS] == list(chain.THRESHOLD)
    for sign in SIGNS:
        assert [strong.rotate_deg(v, sign) for v in LEVELS] == [sign * deg for deg in chain.DEGREES]
        assert [strong.shear(v, sign) for v in LEVELS] == pytest.approx([sign * shear for shear in chain.SHEAR])
        for size, px in chain.TRANSLATE_PX.items():
            assert [strong.translate_px(v, sign, size) for v in LEVELS] == [sign * n for n in px]


@pytest.mark.parametrize("operation", range(14), ids=strong.POOL)
@pytest.mark.parametrize("size", [32, 96, 224])
def test_an_operation_equals_pillows_at_every_level_and_sign(operation, size, photos):
    draws = [(operation, level, sign) for level in LEVELS for sign in SIGNS]
    crops = [photos[i % 4].crop((i, 2 * i, i + size, 2 * i + size)) for i in range(len(draws))]
    for image, draw, ours in zip(crops, draws, rendered(crops, [[draw] for draw in draws])):
        assert_array_equal(ours, np.asarray(strong_of(image, *draw)), err_msg=str(draw))


@pytest.mark.parametrize("operation", range(14), ids=strong.POOL)
def test_an_operation_equals_pillows_where_a_histogram_is_degenerate(operation):
    """One value only, a channel of one value, two neighbouring values, a single pixel that differs."""
    images = [Image.new("RGB", (32, 32), colour) for colour in ((0, 0, 0), (255, 255, 255), (7, 128, 250))]
    pixels = np.full((2, 32, 32, 3), 100, dtype=np.uint8)
    pixels[0, :, :, 1] = np.arange(32)
    pixels[0, :, 16:, 2] = 101
    pixels[1, 3, 5] = (0, 255, 1)
    images += [Image.fromarray(image) for image in pixels]
    for image, ours in zip(images, rendered(images, [[(operation, 4, -1)]] * 5)):
        assert_array_equal(ours, np.asarray(strong_of(image, operation, 4, -1)))


def test_draws_are_applied_one_after_another(photos):
    """Order matters: a shear after a posterize is not the posterize of a shear; -1 leaves the image alone."""
    rng = np.random.default_rng(1)
    draws = [
        [(int(rng.integers(-1, 14)), int(rng.integers(1, 10)), int(rng.choice(SIGNS))) for _ in range(5)]
        for _ in range(60)
    ]
    crops = [photos[i % 4].crop((i, i, i + 96, i + 96)) for i in range(60)]
    for image, asked, ours in zip(crops, draws, rendered(crops, draws)):
        expected = image
        for draw in asked:
            expected = strong_of(expected, *draw) if draw[0] >= 0 else expected
        assert_array_equal(ours, np.asarray(expected), err_msg=str(asked))


def test_nothing_is_done_where_no_draw_applies(photos):
    crops = [photos[i].crop((9, 9, 41, 41)) for i in range(2)]
    for image, ours in zip(crops, rendered(crops, [[(-1, 9, 1)] * 5, [(strong.POOL.index("identity"), 9, 1)] * 5])):
        assert_array_equal(ours, np.asarray(image))


def test_the_flip_comes_before_the_strong_draws(photos):
    image = photos[0].crop((0, 0, 32, 32))
    turned = strong_of(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 7, 9, 1)
    assert_array_equal(rendered([image], [[(7, 9, 1)]], flip=True)[0], np.asarray(turned))


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("level", [1, 5, 9])
def test_a_translation_shows_the_input_at_x_plus_px(level, sign, photos):
    """By slices: what comes in at the border is black."""
    image = photos[0].crop((100, 100, 196, 196))
    pixels, px = np.asarray(image), sign * {1: 2, 5: 14, 9: 25}[level]
    expected = np.zeros_like(pixels)
    shown, source = (slice(0, 96 - px), slice(px, 96)) if px > 0 else (slice(-px, 96), slice(0, 96 + px))
    expected[:, shown] = pixels[:, source]
    assert_array_equal(one(image, "translate_x", level, sign), expected)
    expected = np.zeros_like(pixels)
    expected[shown] = pixels[source]
    assert_array_equal(one(image, "translate_y", level, sign), expected)


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("level", [1, 5, 9])  # odd ones: no place lies on the border of two pixels
def test_a_shear_shows_the_input_at_x_plus_shear_times_y(level, sign, photos):
    """By the definition: the pixel that holds the place (x + shear y, y) of each pixel's centre, or black."""
    image = photos[0].crop((100, 100, 196, 196))
    pixels, centre = np.asarray(image), np.arange(96) + 0.5
    y, x = np.meshgrid(centre, centre, indexing="ij")
    column = np.floor(x + sign * 0.03 * level * y).astype(int)
    inside = (column >= 0) & (column < 96)
    row = np.arange(96)[:, None]
    expected = np.where(inside[..., None], pixels[row, column.clip(0, 95)], 0)
    assert_array_equal(one(image, "shear_x", level, sign), expected)
    mirrored = Image.fromarray(np.ascontiguousarray(pixels.swapaxes(0, 1)))  # x and y change places
    assert_array_equal(one(mirrored, "shear_y", level, sign), expected.swapaxes(0, 1))


@pytest.mark.parametrize("level", LEVELS)
def test_a_rotation_of_positive_sign_is_counter_clockwise(level):
    """A dot right of the centre goes up, by the sine of three degrees a level."""
    pixels = np.zeros((96, 96, 3), dtype=np.uint8)
    pixels[46:50, 82:86] = 255  # 36 px right of the centre
    for sign in SIGNS:
        y, x = np.argwhere(one(Image.fromarray(pixels), "rotate", level, sign)[..., 0]).mean(axis=0) + 0.5 - 48
        angle = np.deg2rad(3 * level * sign)
        assert (x, -y) == pytest.approx((36 * np.cos(angle), 36 * np.sin(angle)), abs=0.5)  # half a pixel


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometry_fills_with_black_and_takes_the_nearest_pixel(name):
    """Of a picture in two bright colours nothing comes out but these and black: no pixel is a mixture."""
    squares = np.indices((96, 96)).sum(axis=0) // 3 % 2
    pixels = np.where(squares[..., None] == 1, (255, 10, 200), (20, 255, 90)).astype(np.uint8)
    moved = one(Image.fromarray(pixels), name, 9, 1)
    colours = np.unique(moved.reshape(-1, 3), axis=0).tolist()
    assert colours == [[0, 0, 0], [20, 255, 90], [255, 10, 200]]
    assert moved.shape == pixels.shape


def test_the_enhancing_factors_only_ever_weaken(photos):
    """Below 1 at every level: darker, greyer, flatter, softer."""
    image = photos[0].crop((100, 100, 196, 196))
    before = np.asarray(image).astype(float)
    for level in LEVELS:
        assert one(image, "brightness", level, 1).mean() < before.mean()
        assert one(image, "saturation", level, 1).std(axis=2).mean() < before.std(axis=2).mean()
        assert one(image, "contrast", level, 1).std() < before.std()
        assert roughness(one(image, "sharpness", level, 1)) < roughness(before)


def roughness(pixels: np.ndarray) -> float:
    return float(abs(np.diff(pixels.astype(float), axis=0)).mean())
