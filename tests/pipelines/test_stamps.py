"""Views of stamps: turned windows in float against an oracle and SciPy, and the road from HDF5 to batches."""

from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from scipy import ndimage

from pipelines.augment import AugmentSpec
from pipelines.backends import DecodeError, Job, chosen, make
from pipelines.backends.stamps import stretch, turned_window
from pipelines.draw import draw_view
from pipelines.loader import Batch, Loader, read_once
from pipelines.synthetic import SyntheticLoader
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest, ShardError
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import hdf5
from shard_tools.stamps import encode
from tests.oracle import stamps as oracle
from tests.shards import write_split

NUM, BANDS, SIDE = 26, 5, 24
LOG = AugmentSpec(flip_p=0.5, stretch="log10", floor=0.1, mean=(0.0,), std=(1.0,))
QUERY = ViewSpec("query", 16, crop="turned", shift_px=3, augment=LOG)
KEY = dataclasses.replace(QUERY, role="key")
WEIGHT = dataclasses.replace(QUERY, role="weight", shows="positive", same_as="query")
SPECS = [QUERY, KEY, WEIGHT]
CENTRE = dataclasses.replace(QUERY, role="eval", turn_deg=0.0, shift_px=0, augment=dataclasses.replace(LOG, flip_p=0.0))
RAW = dataclasses.replace(CENTRE, augment=dataclasses.replace(CENTRE.augment, stretch="none"))


def sky(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Float32 noise around 0 with a bright middle, as a stamp has it."""
    pixels = rng.normal(0, 1, shape)
    height, width = shape[-2:]
    pixels[..., height // 4 : 3 * height // 4, width // 4 : 3 * width // 4] += rng.uniform(5, 50)
    return pixels.astype(np.float32)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    rng = np.random.default_rng(11)
    return np.stack([sky(rng, BANDS, SIDE, SIDE + 1) for _ in range(NUM)])  # an odd and an even side


@pytest.fixture(scope="module")
def manifest(pixels: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """The stamps packed from HDF5 in their shuffled order; the label is the row in `pixels`."""
    root = tmp_path_factory.mktemp("stamps")
    with h5py.File(root / "sky.h5", "w") as file:
        file["images"], file["labels"] = pixels, np.arange(NUM)
    return pack(hdf5.open_source(root / "sky.h5", "train"), root / "shards", PackOptions(shard_size=7)).manifest


def take(manifest: Manifest, num: int, start: int = 0, **options) -> list[Batch]:
    with Loader(manifest, SPECS, **{"batch_size": 8, "seed": 5, **options}) as loader:
        batches = loader.batches(start)
        return [next(batches) for _ in range(num)]


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one.step == other.step
        assert_array_equal(one.ids, other.ids)
        for role in one.views:
            for view, same in zip(one.views[role], other.views[role], strict=True):
                assert torch.equal(view, same)


def render(specs: list[ViewSpec], files: list[bytes], bands: int, **options) -> list[torch.Tensor]:
    """The views of square stamps of 24 px in epoch 0."""
    ids = np.arange(len(files))
    draws = [draw_view(spec, i, 0, 0, ids, [SIDE] * len(ids), [SIDE] * len(ids)) for i, spec in enumerate(specs)]
    settings = {"device": "cpu", "threads": 1, "output": "float32", "depth": 1, **options}
    backend = make("stamps", specs, len(files), bands=bands, **settings)
    try:
        backend.submit(Job(files, draws, [f"shard:{i}" for i in ids]))
        return backend.collect()
    finally:
        backend.close()


def turn(stamp: np.ndarray, *place: float) -> np.ndarray:
    """`turned_window` with the bands first."""
    return turned_window(stamp.transpose(1, 2, 0), *place).transpose(2, 0, 1)


# The geometry. Float32 against float64: values up to about 50, so 1e-5 is a few units of the last place.


@pytest.mark.parametrize("degrees", [0.0, 17.3, 90.0, -135.0, 180.0])
@pytest.mark.parametrize(("height", "width"), [(24, 24), (23, 24), (25, 23)])
def test_a_turned_window_is_the_oracles(rng, degrees, height, width):
    stamp = sky(rng, 2, height, width)
    expected = oracle.window(stamp.astype(float), degrees, 5, 2, 15)
    assert_allclose(turn(stamp, 5, 2, 15, 15, degrees), expected, atol=1e-5)


@pytest.mark.parametrize("degrees", [0.0, 31.0, 90.0, -118.7])
def test_a_turned_window_is_scipys_rotation_and_then_a_crop(rng, degrees):
    stamp = sky(rng, 1, 31, 31)
    whole = ndimage.rotate(stamp[0].astype(float), degrees, reshape=False, order=1, mode="grid-constant", cval=0.0)
    assert_allclose(turn(stamp, 0, 0, 31, 31, degrees)[0], whole, atol=1e-5)
    assert_allclose(turn(stamp, 4, 9, 18, 18, degrees)[0], whole[4:22, 9:27], atol=1e-5)


def test_a_quarter_turn_is_rot90(rng):
    stamp = sky(rng, 3, 20, 20)
    assert_allclose(turn(stamp, 0, 0, 20, 20, 90.0), np.rot90(stamp, axes=(1, 2)), atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (23, 24), (101, 67)])
def test_no_turn_gives_the_pixels_themselves(rng, height, width):
    stamp = sky(rng, 4, height, width)
    assert_array_equal(turn(stamp, 3, 5, 16, 17, 0.0), stamp[:, 3:19, 5:22])


def test_outside_of_the_stamp_there_are_zeros(rng):
    stamp = sky(rng, 1, 20, 20)
    window = turn(stamp, -30, -5, 60, 60, 0.0)
    expected = np.zeros((1, 60, 60), np.float32)
    expected[:, 30:50, 5:25] = stamp
    assert_array_equal(window, expected)
    assert not turn(np.ones((1, 20, 20), np.float32), 0, 0, 20, 20, 45.0)[0, 0, 0]


# The stretch


def test_the_logarithm_has_a_floor_under_what_is_not_positive_only():
    values = np.array([-3, 0, 1e-6, 0.1, 1, 250], np.float32)
    golden = [-1, -1, -6, -1, 0, 2.39794]
    assert_allclose(stretch(values, LOG), golden, atol=1e-5)
    assert_allclose(oracle.log_stretch(values.astype(float), 0.1), golden, atol=1e-5)
    assert_array_equal(oracle.positive(values), [0, 0, 1, 1, 1, 1])


def test_the_positive_view_is_1_where_there_is_light():
    stamp = np.zeros((1, SIDE, SIDE), np.float32)
    stamp[0, 10, 8:14] = [-3, 0, 1e-6, 0.1, 1, 250]
    (view,) = render([dataclasses.replace(CENTRE, shows="positive", same_as="")], [encode(stamp)], 1)
    assert_array_equal(view[0, 0, 6, 4:10], [0, 0, 1, 1, 1, 1])
    assert view.sum() == 4


@pytest.mark.parametrize(("mean", "std"), [((1.5,), (2.0,)), ((0.0, 1.0, -2.0), (1.0, 0.5, 4.0))])
def test_values_are_normalised_by_one_number_or_one_a_band(rng, mean, std):
    stamp = sky(rng, 3, SIDE, SIDE)
    spec = dataclasses.replace(RAW, augment=dataclasses.replace(RAW.augment, mean=mean, std=std))
    (view,) = render([spec], [encode(stamp)], 3)
    by_band = [np.reshape(numbers, (-1, 1, 1)) for numbers in (mean, std)]
    assert_allclose(view[0], (stamp[:, 4:20, 4:20] - by_band[0]) / by_band[1], rtol=1e-6, atol=1e-6)


def test_a_flip_mirrors_left_and_right(rng):
    stamp = sky(rng, 2, SIDE, SIDE)
    always = dataclasses.replace(RAW, augment=dataclasses.replace(RAW.augment, flip_p=1.0))
    (view,) = render([always], [encode(stamp)], 2)
    assert_array_equal(view[0], stamp[:, 4:20, 4:20][:, :, ::-1])


# The road from a file to batches


def test_packed_stamps_come_out_as_the_oracle_makes_them(manifest, pixels):
    for batch in take(manifest, 2):
        ids = batch.ids.numpy()
        size = [SIDE + 1] * len(ids), [SIDE] * len(ids)
        for number, role in ((0, "query"), (1, "key")):
            draws = draw_view(QUERY, number, 5, 0, ids, *size)
            for i, row in enumerate(batch.labels.tolist()):
                top, left, _, _ = draws.crop[i].tolist()
                window = oracle.window(pixels[row].astype(float), draws.turn_deg[i], top, left, 16)
                window = window[:, :, ::-1] if draws.flip[i] else window
                safe = np.abs(window) > 1e-3  # rounding may carry a value next to 0 over it, and its logarithm anywhere
                view = batch.views[role][0][i].numpy()
                assert_allclose(view[safe], oracle.log_stretch(window, 0.1)[safe], atol=1e-4)
                if role == "query":
                    assert_array_equal(batch.views["weight"][0][i].numpy()[safe], oracle.positive(window)[safe])


def test_the_weight_shows_the_very_window_of_the_query(manifest):
    (batch,) = take(manifest, 1)
    query, key, weight = (batch.views[role][0] for role in ("query", "key", "weight"))
    assert set(weight.unique().tolist()) == {0.0, 1.0}
    assert_array_equal(query[weight == 0], torch.full_like(query[weight == 0], -1.0))
    assert ((query == -1.0) & (weight == 1)).sum() == 0  # no pixel happens to be 0.1 exactly
    assert not torch.equal(query, key)


def test_the_centre_of_a_stamp_is_read_bit_for_bit(manifest, pixels):
    for batch in read_once(manifest, [RAW], batch_size=10):
        for view, row in zip(batch.views["eval"][0], batch.labels.tolist()):
            assert_array_equal(view, pixels[row][:, 4:20, 4:20])


@pytest.mark.parametrize(("output", "dtype"), [("uint8", torch.float32), ("float32", torch.float32)])
def test_views_are_channels_last_floats_of_all_bands(manifest, output, dtype):
    (batch,) = take(manifest, 1, output=output)
    for views in batch.views.values():
        (view,) = views
        assert (view.shape, view.dtype) == ((8, BANDS, 16, 16), dtype)
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_float16_is_the_float32_view_rounded(manifest):
    (batch,), (half,) = take(manifest, 1), take(manifest, 1, output="float16")
    for role in batch.views:
        assert half.views[role][0].dtype == torch.float16
        assert torch.equal(half.views[role][0], batch.views[role][0].half())


@pytest.mark.parametrize("options", [{"threads": 3}, {"prefetch": 4}, {"threads": 2, "prefetch": 1}])
def test_threads_and_prefetch_change_no_value(manifest, options):
    assert_same(take(manifest, 4, threads=1), take(manifest, 4, **options))


def test_a_resume_at_any_step_gives_the_same_batches(manifest):
    whole = take(manifest, 7)  # over two ends of an epoch
    for start in (1, 3, 6):
        assert_same(take(manifest, 7 - start, start), whole[start:])


def test_two_ranks_share_the_batch_of_one(manifest):
    (whole,) = take(manifest, 1)
    parts = [take(manifest, 1, rank=rank, world=2)[0] for rank in (0, 1)]
    found = {int(i): view for part in parts for i, view in zip(part.ids, part.views["query"][0])}
    for i, view in zip(whole.ids, whole.views["query"][0]):
        assert torch.equal(found[int(i)], view)


# What is refused


@pytest.mark.parametrize("name", ["exact", "dali"])
def test_a_backend_for_photographs_is_refused_for_stamps(manifest, name):
    with pytest.raises(ValueError, match=rf"^loader.backend is '{name}', but .*stamps of 5 bands; leave it at auto$"):
        Loader(manifest, SPECS, batch_size=8, seed=0, backend=name)


def test_the_backend_for_stamps_is_refused_for_photographs(tiny_shards):
    with pytest.raises(ValueError, match=r"^loader\.backend is 'stamps', but these shards hold photographs; leave it"):
        Loader(Manifest.load(tiny_shards), [ViewSpec("query", 16)], batch_size=8, seed=0, backend="stamps")


def test_auto_is_stamps_for_stamps_on_any_device():
    assert chosen("auto", "cpu", 5) == chosen("auto", "cuda:0", 5) == "stamps"
    assert (chosen("auto", "cpu"), chosen("auto", "cuda:0")) == ("native", "dali")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"crop": "turned"}, "crop"),
        ({"shows": "positive"}, "shows"),
        ({"augment": AugmentSpec(stretch="log10")}, "augment.stretch"),
        ({"augment": AugmentSpec(mean=(0.5,), std=(1.0,))}, "augment.mean"),
    ],
)
def test_a_view_for_stamps_is_refused_for_photographs(tiny_shards, change, key):
    with pytest.raises(ValueError, match=rf"^views\.query\.{key} is .* for stamps"):
        Loader(Manifest.load(tiny_shards), [ViewSpec("query", 16, **change)], batch_size=8, seed=0)


@pytest.mark.parametrize(
    "change",
    [{"jitter_p": 0.8}, {"grayscale_p": 0.2}, {"blur_p": 0.5}, {"solarize_p": 0.1}, {"strong_draws": 5}],
)
def test_an_augmentation_of_photographs_is_refused_for_stamps(manifest, change):
    (key,) = change
    spec = dataclasses.replace(QUERY, augment=dataclasses.replace(LOG, **change))
    with pytest.raises(ValueError, match=rf"^views\.query\.augment\.{key} is .*; set it to 0$"):
        Loader(manifest, [spec], batch_size=8, seed=0)


@pytest.mark.parametrize("change", [{"crop": "random_resized"}, {"crop": "center", "resize": 16}])
def test_a_crop_of_photographs_is_refused_for_stamps(manifest, change):
    with pytest.raises(ValueError, match=r"^views\.query\.crop is .* write crop: turned"):
        Loader(manifest, [dataclasses.replace(QUERY, **change)], batch_size=8, seed=0)


def test_the_photographs_mean_is_refused_for_five_bands(manifest):
    with pytest.raises(ValueError, match=r"^views\.query\.augment\.mean .* 5 bands; give one number, or 5$"):
        Loader(manifest, [ViewSpec("query", 16, crop="turned")], batch_size=8, seed=0)


@pytest.mark.parametrize(
    "change",
    [{"size": 15}, {"turn_deg": 90.0}, {"shift_px": 2}, {"augment": dataclasses.replace(LOG, flip_p=0.0)}],
)
def test_a_weight_made_by_another_recipe_than_its_query_is_refused(manifest, change):
    with pytest.raises(ValueError, match=r"^views\.weight\..* as in views\.query, whose window it shows$"):
        Loader(manifest, [QUERY, dataclasses.replace(WEIGHT, **change)], batch_size=8, seed=0)


def test_a_stamp_smaller_than_the_view_is_named_before_the_first_step(tmp_path, rng):
    with h5py.File(tmp_path / "small.h5", "w") as file:
        file["images"] = sky(rng, 4, 2, 15, 24)
    manifest = pack(hdf5.open_source(tmp_path / "small.h5", "train"), tmp_path / "dst", PackOptions()).manifest
    with pytest.raises(ShardError, match=r"^train-000000\.tar:000000000\.npy is 24 x 15 px, smaller than a view of 16"):
        Loader(manifest, [RAW], batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("stamp", "what"),
    [
        (encode(np.ones((2, SIDE, SIDE))), "has 2 bands, but its manifest says 3"),
        (encode(np.ones((3, 15, SIDE))), "is 24 x 15 px, smaller than a view of 16"),
        (encode(np.ones((3, SIDE, SIDE)))[:-1], "is no good stamp: it has .* bytes, but its header says"),
        (b"\xff\xd8\xff", "is no good stamp: it is no NumPy file"),
    ],
)
def test_a_stamp_that_is_not_what_the_manifest_says_is_named(stamp, what):
    with pytest.raises(DecodeError, match=f"^shard:1 {what}"):
        render([RAW], [encode(np.ones((3, SIDE, SIDE))), stamp], 3)


def test_a_photograph_in_the_place_of_a_stamp_is_named(tiny_files, tmp_path):
    manifest = write_split(tmp_path, tiny_files[:3])
    posing = dataclasses.replace(manifest, census={"bands": 3})
    with pytest.raises(DecodeError, match=r"^train-000000\.tar:00000000\d\..* is no good stamp"):
        list(read_once(posing, [RAW], batch_size=3))


# Synthetic stamps


def test_synthetic_stamps_are_floats_of_any_number_of_bands():
    with SyntheticLoader(SPECS, batch_size=8, num_samples=32, channels=5) as loader:
        batch = next(loader.batches())
    query, weight = batch.views["query"][0], batch.views["weight"][0]
    assert (query.shape, query.dtype) == ((8, 5, 16, 16), torch.float32)
    assert query.is_contiguous(memory_format=torch.channels_last)
    assert_allclose([query.mean(), query.std()], [0, 1], atol=0.05)  # 10,240 bytes: 0.05 is five deviations
    assert torch.equal(weight, (query > 0).float())


def test_synthetic_batches_depend_on_the_number_of_channels():
    fingerprints = {
        SyntheticLoader(SPECS, batch_size=8, num_samples=32, channels=channels).fingerprint for channels in (1, 3, 5)
    }
    assert len(fingerprints) == 3


def test_a_manifest_states_bands_and_channels(manifest, tiny_shards):
    assert (manifest.bands, manifest.channels) == (5, 5)
    photographs = Manifest.load(tiny_shards)
    assert (photographs.bands, photographs.channels) == (0, 3)
