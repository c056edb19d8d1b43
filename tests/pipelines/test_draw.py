"""Draws: the generator against published vectors, the crop against torchvision's own code, the distributions."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import stats

from pipelines.augment import AugmentSpec
from pipelines.draw import ViewDraws, draw_view
from pipelines.philox import check_seed, philox
from pipelines.views import ViewSpec, flatten

STRONG = AugmentSpec(
    jitter_p=0.8,
    brightness=0.4,
    contrast=0.3,
    saturation=1.5,
    hue=0.1,
    grayscale_p=0.2,
    blur_p=0.5,
    blur_sigma=(0.1, 2.0),
    solarize_p=0.25,
    flip_p=0.5,
)
VIEW = ViewSpec("query", 224, augment=STRONG)
CLSA = ViewSpec("strong", 96, augment=dataclasses.replace(STRONG, strong_draws=5))
STAMP = ViewSpec("query", 61, crop="turned", turn_deg=90.0, shift_px=4)
ALPHA = 1e-4  # seeds are fixed, so a failure is a change of the code and not bad luck

# draw_view(VIEW, 1, 2**33 + 7, 12, [0, 2], [500, 375], [375, 500]) when it was written.
GOLDEN_CROP = [[8, 169, 308, 244], [64, 74, 272, 221]]
GOLDEN_ORDER = [[1, 3, 2, 0], [1, 3, 0, 2]]
GOLDEN_BRIGHTNESS = [1.0673966, 1.1916691]
GOLDEN_HUE = [-0.08698361, 0.02005655]
GOLDEN_SIGMA = [0.0, 1.1019034]
GOLDEN_FLAGS = [[True, True], [True, True], [False, False], [True, True]]
# The same of CLSA and of STAMP.
GOLDEN_OPERATION = [[5, -1, 9, 13, 12], [-1, 9, -1, 5, 12]]
GOLDEN_LEVEL = [[1, 5, 7, 4, 5], [4, 3, 6, 8, 5]]
GOLDEN_SIGN = [[1, -1, -1, -1, -1], [-1, 1, 1, 1, 1]]
GOLDEN_TURN_DEG = [41.730751, 19.606838]
GOLDEN_WINDOW = [[154, 220, 61, 61], [217, 157, 61, 61]]


def scalar_philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10, typed from section 4.3 of the paper, one counter at a time."""
    left_0, right_0, left_1, right_1 = counter
    key_0, key_1 = key
    for _ in range(10):
        high_0, low_0 = divmod(left_0 * 0xD2511F53, 2**32)
        high_1, low_1 = divmod(left_1 * 0xCD9E8D57, 2**32)
        left_0, right_0, left_1, right_1 = high_1 ^ right_0 ^ key_0, low_1, high_0 ^ right_1 ^ key_1, low_0
        key_0, key_1 = (key_0 + 0x9E3779B9) % 2**32, (key_1 + 0xBB67AE85) % 2**32
    return left_0, right_0, left_1, right_1


# The known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    assert tuple(philox(key[1] << 32 | key[0], counter).tolist()) == expected
    assert scalar_philox(key, counter) == expected


@given(
    key=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
    counters=st.lists(st.tuples(*[st.integers(0, 2**32 - 1)] * 4), min_size=1, max_size=5),
)
@settings(max_examples=50, deadline=None)
def test_philox_on_arrays_equals_the_scalar_form(key, counters):
    words = philox(key[1] << 32 | key[0], tuple(np.array(counters).T))
    assert words.T.tolist() == [list(scalar_philox(key, counter)) for counter in counters]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=r"run\.seed"):
        check_seed(seed)


def draws_of(spec: ViewSpec, num: int = 20_000, *, view: int = 0, seed: int = 5, epoch: int = 3) -> ViewDraws:
    return draw_view(spec, view, seed, epoch, np.arange(num), np.full(num, 500), np.full(num, 375))


def assert_uniform(numbers: np.ndarray, low: float, high: float) -> None:
    assert stats.kstest(numbers, "uniform", (low, high - low)).pvalue > ALPHA
    assert numbers.min() >= np.float32(low)
    assert numbers.max() <= np.float32(high)


def assert_share(flags: np.ndarray, p: float) -> None:
    assert stats.binomtest(int(flags.sum()), len(flags), p).pvalue > ALPHA


def test_factors_are_uniform_over_their_ranges():
    draws = draws_of(VIEW)
    assert_uniform(draws.brightness, 0.6, 1.4)
    assert_uniform(draws.contrast, 0.7, 1.3)
    assert_uniform(draws.saturation, 0.0, 2.5)  # not below 0 though 1 - 1.5 is
    assert_uniform(draws.hue, -0.1, 0.1)
    assert_uniform(draws.sigma[draws.sigma > 0], 0.1, 2.0)


def test_probabilities_are_met():
    draws = draws_of(VIEW)
    assert_share(draws.jitter, 0.8)
    assert_share(draws.grayscale, 0.2)
    assert_share(draws.sigma > 0, 0.5)
    assert_share(draws.solarize, 0.25)
    assert_share(draws.flip, 0.5)


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_probabilities_of_0_and_1_are_certain(p):
    augment = AugmentSpec(jitter_p=p, grayscale_p=p, blur_p=p, solarize_p=p, flip_p=p)
    draws = draws_of(ViewSpec("query", 32, augment=augment), 1000)
    for flags in (draws.jitter, draws.grayscale, draws.sigma > 0, draws.solarize, draws.flip):
        assert flags.all() == bool(p)
        assert flags.any() == bool(p)


def test_all_24_orders_of_the_jitter_are_equally_frequent():
    order = draws_of(VIEW).order
    assert (np.sort(order, axis=1) == np.arange(4)).all()
    _, counts = np.unique(order @ np.array([64, 16, 4, 1]), return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > ALPHA


def test_strengths_of_0_are_exactly_neutral():
    draws = draws_of(ViewSpec("query", 32), 100)
    for factor in (draws.brightness, draws.contrast, draws.saturation):
        assert_array_equal(factor, np.float32(1))
    assert_array_equal(draws.hue, np.float32(0))
    assert_array_equal(draws.sigma, np.float32(0))


def torchvision_crop(uniforms: list[tuple[float, float]], spec: ViewSpec, width: int, height: int) -> tuple[int, ...]:
    """RandomResizedCrop.get_params with its numbers given: top and left are left out where they are random."""
    for u_area, u_aspect in uniforms:
        target = width * height * (spec.scale[0] + u_area * (spec.scale[1] - spec.scale[0]))
        low, high = math.log(spec.ratio[0]), math.log(spec.ratio[1])
        aspect = math.exp(low + u_aspect * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return h, w
    in_ratio = width / height
    w, h = width, height
    if in_ratio < min(spec.ratio):
        h = round(w / min(spec.ratio))
    elif in_ratio > max(spec.ratio):
        w = round(h * max(spec.ratio))
    return h, w, (height - h) // 2, (width - w) // 2


@pytest.mark.parametrize(
    "size", [(500, 375), (40, 41), (333, 90), (30, 200), (3, 3), (1, 50), (700, 1), (8, 2), (2, 8)]
)
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.9, 1.0)])
def test_crops_are_those_of_torchvision_for_the_same_numbers(size, scale):
    spec, (width, height), num, seed = ViewSpec("query", 32, scale=scale), size, 200, 9
    draws = draw_view(spec, 1, seed, 2, np.arange(num), np.full(num, width), np.full(num, height))
    for sample in range(num):
        words = [w / 2**32 for block in range(5) for w in scalar_philox((seed, 0), (block, 1, sample, 2))]
        expected = torchvision_crop(list(zip(words[0::2], words[1::2])), spec, width, height)
        top, left, h, w = draws.crop[sample].tolist()
        assert (h, w, top, left)[: len(expected)] == expected


def test_crop_positions_are_uniform_over_all_that_fit():
    spec = ViewSpec("query", 32, scale=(0.25, 0.25), ratio=(1.0, 1.0))
    num = 20_000
    crop = draw_view(spec, 0, 1, 0, np.arange(num), np.full(num, 20), np.full(num, 20)).crop
    assert (crop[:, 2:] == 10).all()
    places = np.bincount(crop[:, 0] * 11 + crop[:, 1], minlength=121)
    assert len(places) == 121
    assert stats.chisquare(places).pvalue > ALPHA


def test_crop_areas_and_aspects_follow_torchvisions_distribution():
    """The first try always fits a square image with scale <= 0.5, so area is uniform and aspect log-uniform."""
    num = 20_000
    spec = ViewSpec("query", 32, scale=(0.1, 0.5))
    crop = draw_view(spec, 0, 1, 0, np.arange(num), np.full(num, 4000), np.full(num, 4000)).crop.astype(float)
    assert_uniform((crop[:, 2] * crop[:, 3] / 4000**2).clip(0.1, 0.5), 0.1, 0.5)
    low, high = math.log(3 / 4), math.log(4 / 3)
    assert_uniform(np.log(crop[:, 3] / crop[:, 2]).clip(low, high), low, high)


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    scale=st.tuples(st.floats(1e-4, 1), st.floats(1e-4, 1)).map(sorted).map(tuple),
    ratio=st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted).map(tuple),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=200, deadline=None)
def test_a_crop_is_never_empty_nor_outside_the_image(width, height, scale, ratio, seed):
    spec = ViewSpec("query", 32, scale=scale, ratio=ratio)
    crop = draw_view(spec, 0, seed, 0, np.arange(8), np.full(8, width), np.full(8, height)).crop
    top, left, h, w = crop.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (h >= 1).all()
    assert (w >= 1).all()
    assert (top + h <= height).all()
    assert (left + w <= width).all()


def test_a_center_view_keeps_the_whole_image_and_has_the_same_other_draws():
    center = draws_of(dataclasses.replace(VIEW, crop="center", resize=256), 10)
    assert_array_equal(center.crop, np.tile([0, 0, 375, 500], (10, 1)))
    assert_array_equal(center.flip, draws_of(VIEW, 10).flip)


def equal_rows(a: ViewDraws, b: ViewDraws, rows_a: np.ndarray, rows_b: np.ndarray) -> bool:
    return all(
        np.array_equal(getattr(a, field.name)[rows_a], getattr(b, field.name)[rows_b])
        for field in dataclasses.fields(ViewDraws)
    )


@given(ids=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=20, unique=True), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=50, deadline=None)
def test_the_draws_of_a_sample_do_not_depend_on_its_batch(ids, seed):
    sizes = np.array([(40 + i % 7, 50 + i % 11) for i in ids])
    for spec in (CLSA, STAMP):
        together = draw_view(spec, 1, seed, 4, ids, sizes[:, 0], sizes[:, 1])
        for place, (sample, (width, height)) in enumerate(zip(ids, sizes)):
            alone = draw_view(spec, 1, seed, 4, [sample], [width], [height])
            assert equal_rows(together, alone, np.array([place]), np.array([0]))


@pytest.mark.parametrize("change", [{"view": 1}, {"seed": 6}, {"epoch": 4}, {"seed": 5 + 2**40}])
def test_views_seeds_and_epochs_draw_independently(change):
    one, other = draws_of(VIEW), draws_of(VIEW, **change)
    for name in ("brightness", "contrast", "saturation", "hue"):
        assert abs(stats.pearsonr(getattr(one, name), getattr(other, name)).statistic) < 0.03  # 4 sigma of 20,000
    assert_share(one.flip ^ other.flip, 0.5)


def test_the_numbers_of_one_draw_are_uncorrelated():
    draws = draws_of(VIEW)
    columns = [draws.brightness, draws.contrast, draws.saturation, draws.hue, draws.flip, draws.jitter, draws.grayscale]
    columns += [draws.sigma, draws.solarize, *draws.crop.T[:2], draws.order[:, 0]]
    correlation = np.corrcoef(np.stack([np.asarray(column, dtype=float) for column in columns]))
    # Top and left are correlated by the size of the crop, as in torchvision.
    correlation[9, 10] = correlation[10, 9] = 0
    assert abs(correlation - np.eye(len(columns))).max() < 0.03


def assert_equally_frequent(numbers: np.ndarray, choices: range) -> None:
    counts = np.bincount(numbers - choices[0], minlength=len(choices))
    assert len(counts) == len(choices)
    assert stats.chisquare(counts).pvalue > ALPHA


def test_strong_draws_are_uniform_over_the_pool_the_levels_and_the_signs():
    draws = draws_of(CLSA)
    applied = draws.strong_operation >= 0
    assert applied.shape == (20_000, 5)
    for draw in range(5):
        assert_share(applied[:, draw], 0.5)
        assert_equally_frequent(draws.strong_operation[applied[:, draw], draw], range(14))
        assert_equally_frequent(draws.strong_level[:, draw], range(1, 10))
        assert_share(draws.strong_sign[:, draw] == 1, 0.5)
    assert set(np.unique(draws.strong_sign)) == {-1, 1}


def test_strong_draws_are_made_with_replacement():
    """Two draws that are both applied agree in one of fourteen."""
    operation = draws_of(CLSA).strong_operation
    both = (operation[:, 0] >= 0) & (operation[:, 1] >= 0)
    assert_share(operation[both, 0] == operation[both, 1], 1 / 14)


@pytest.mark.parametrize("change", [{}, {"view": 1}, {"seed": 6}, {"epoch": 4}])
def test_strong_draws_are_independent_of_each_other_and_differ_by_view_seed_and_epoch(change):
    """The first draws of one view with the second of the same view, or with the first of another."""
    one, other, second = draws_of(CLSA), draws_of(CLSA, **change), int(not change)
    assert_share((one.strong_operation[:, 0] >= 0) ^ (other.strong_operation[:, second] >= 0), 0.5)
    assert_share(one.strong_level[:, 0] == other.strong_level[:, second], 1 / 9)
    assert_share(one.strong_sign[:, 0] == other.strong_sign[:, second], 0.5)
    both = (one.strong_operation[:, 0] >= 0) & (other.strong_operation[:, second] >= 0)
    assert_share(one.strong_operation[both, 0] == other.strong_operation[both, second], 1 / 14)


def test_neighbouring_samples_draw_independently():
    draws = draws_of(CLSA)
    for numbers in (draws.strong_operation[:, 0], draws.strong_level[:, 0], draws.strong_sign[:, 0], draws.hue):
        assert abs(stats.pearsonr(numbers[:-1], numbers[1:]).statistic) < 0.03  # 4 sigma of 20,000


def test_the_parts_of_a_strong_draw_are_uncorrelated_with_each_other_and_with_the_rest():
    draws = draws_of(CLSA)
    applied = draws.strong_operation[:, 0] >= 0
    columns = [draws.strong_operation[:, 0], draws.strong_level[:, 0], draws.strong_sign[:, 0], draws.brightness]
    columns += [draws.hue, draws.sigma, draws.flip, draws.crop[:, 0], draws.crop[:, 2], draws.strong_level[:, 1]]
    correlation = np.corrcoef(np.stack([column[applied].astype(float) for column in columns]))
    correlation[7, 8] = correlation[8, 7] = 0  # top and height
    assert abs(correlation - np.eye(len(columns))).max() < 0.04  # 4 sigma of 10,000
    assert abs(stats.pearsonr(applied, draws.strong_level[:, 0]).statistic) < 0.03


def test_strong_draws_change_no_other_draw_and_more_of_them_change_no_earlier_one():
    """They have blocks of their own."""
    without, three, sixteen = (
        draws_of(dataclasses.replace(CLSA, augment=dataclasses.replace(STRONG, strong_draws=num)), 500)
        for num in (0, 3, 16)
    )
    for field in dataclasses.fields(ViewDraws):
        few, many = getattr(three, field.name), getattr(sixteen, field.name)
        if field.name.startswith("strong_"):
            assert getattr(without, field.name).shape == (500, 0)
            assert_array_equal(few, many[:, :3])
        else:
            assert_array_equal(getattr(without, field.name), many)


def test_a_turn_is_uniform_and_only_for_turned_views():
    assert_uniform(draws_of(STAMP).turn_deg, -90, 90)
    assert_uniform(draws_of(dataclasses.replace(STAMP, turn_deg=180.0)).turn_deg, -180, 180)
    assert_array_equal(draws_of(dataclasses.replace(STAMP, turn_deg=0.0), 50).turn_deg, np.float32(0))
    assert_array_equal(draws_of(VIEW, 50).turn_deg, np.float32(0))


@pytest.mark.parametrize(
    ("width", "height", "top", "left"), [(97, 121, 30, 18), (98, 98, 18, 18), (61, 61, 0, 0), (60, 61, 0, -1)]
)
def test_a_turned_view_is_a_window_around_the_centre_shifted_by_whole_px(width, height, top, left):
    """Every offset -4..4 equally often on each axis; where sides differ by an odd number, half a pixel up and left."""
    num = 20_000
    crop = draw_view(STAMP, 0, 5, 3, np.arange(num), np.full(num, width), np.full(num, height)).crop
    assert (crop[:, 2:] == 61).all()
    rows, columns = crop[:, 0] - top, crop[:, 1] - left
    assert_equally_frequent(rows, range(-4, 5))
    assert_equally_frequent(columns, range(-4, 5))
    assert_equally_frequent((rows + 4) * 9 + columns + 4, range(81))  # and independently


def test_a_turned_view_without_a_shift_is_the_central_window():
    crop = draws_of(dataclasses.replace(STAMP, shift_px=0), 50).crop
    assert_array_equal(crop, np.tile([(375 - 61) // 2, (500 - 61) // 2, 61, 61], (50, 1)))


def test_same_as_repeats_the_draws_of_the_other_roles_first_view():
    specs = [
        ViewSpec("key", 32),
        dataclasses.replace(STAMP, count=2),
        dataclasses.replace(STAMP, role="weight", shows="positive", same_as="query"),
        dataclasses.replace(STAMP, role="own"),
    ]
    numbered = flatten(specs)
    assert [(view, spec.role) for view, spec in numbered] == [
        (0, "key"), (1, "query"), (2, "query"), (1, "weight"), (4, "own")
    ]  # fmt: skip
    first, second, weight, own = (draws_of(spec, 200, view=view) for view, spec in numbered[1:])
    everything = np.arange(200)
    assert equal_rows(first, weight, everything, everything)
    for other in (second, own):
        assert (first.turn_deg != other.turn_deg).mean() > 0.99
        assert (first.crop != other.crop).any(axis=1).mean() > 0.9


def test_strong_draws_read_their_blocks_as_written():
    """Draw d reads block 16 + d: operation, level, sign, application."""
    draws = draw_view(CLSA, 3, 9, 2, [7, 8], [50, 50], [40, 40])
    for i, sample in enumerate((7, 8)):
        for draw in range(5):
            words = [word / 2**32 for word in scalar_philox((9, 0), (16 + draw, 3, sample, 2))]
            assert draws.strong_operation[i, draw] == (int(words[0] * 14) if words[3] < 0.5 else -1)
            assert draws.strong_level[i, draw] == 1 + int(words[1] * 9)
            assert draws.strong_sign[i, draw] == (-1 if words[2] < 0.5 else 1)


def test_strong_draws_and_turned_windows_are_what_they_were_when_they_came():
    draws = draw_view(CLSA, 1, 2**33 + 7, 12, [0, 2], [500, 375], [375, 500])
    assert draws.strong_operation.tolist() == GOLDEN_OPERATION
    assert draws.strong_level.tolist() == GOLDEN_LEVEL
    assert draws.strong_sign.tolist() == GOLDEN_SIGN
    draws = draw_view(STAMP, 1, 2**33 + 7, 12, [0, 2], [500, 375], [375, 500])
    assert draws.turn_deg.tolist() == pytest.approx(GOLDEN_TURN_DEG, abs=1e-5)
    assert draws.crop.tolist() == GOLDEN_WINDOW


def test_draws_are_what_they_were_in_version_1():
    """Changed numbers would silently change every run that is resumed; raise loader.FORMAT_VERSION if it must be."""
    draws = draw_view(VIEW, 1, 2**33 + 7, 12, [0, 2], [500, 375], [375, 500])
    assert draws.crop.tolist() == GOLDEN_CROP
    assert draws.order.tolist() == GOLDEN_ORDER
    assert draws.brightness.tolist() == pytest.approx(GOLDEN_BRIGHTNESS, abs=1e-7)
    assert draws.hue.tolist() == pytest.approx(GOLDEN_HUE, abs=1e-7)
    assert draws.sigma.tolist() == pytest.approx(GOLDEN_SIGMA, abs=1e-7)
    flags = [draws.flip, draws.jitter, draws.grayscale, draws.solarize]
    assert [flag.tolist() for flag in flags] == GOLDEN_FLAGS
