"""Stamps of several bands: from HDF5 and FITS to shards that are checked as strictly as photographs are."""

from __future__ import annotations

import gc
import gzip
import io
import json
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import webdataset
from astropy.io import fits as astropy_fits
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from shard_tools import cli, galaxies, stamps
from shard_tools.adopt import AdoptOptions, adopt
from shard_tools.extract import extract
from shard_tools.images import BadImage, Resize, inspect, prepare
from shard_tools.manifest import Manifest, ShardError
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import fits, hdf5
from shard_tools.sources import webdataset as shards
from shard_tools.verify import check
from tests.shard_tools.builders import hashes, jpeg, payloads, plant, shell

NUM = 17


def stamp(seed: int, bands: int = 5, height: int = 12, width: int = 14) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (bands, height, width)).astype(np.float32)


def write_h5(path: Path, images: np.ndarray, **beside: Any) -> Path:
    with h5py.File(path, "w") as file:
        file["images"] = images
        for name, values in beside.items():
            file[name] = values
    return path


def fits_bytes(*units: Any) -> bytes:
    buffer = io.BytesIO()
    astropy_fits.HDUList(list(units)).writeto(buffer)
    return buffer.getvalue()


def primary(pixels: np.ndarray) -> bytes:
    return fits_bytes(astropy_fits.PrimaryHDU(pixels))


def header(text: str, version: bytes = b"\x01\x00") -> bytes:
    padded = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY" + version + len(padded).to_bytes(2, "little") + padded


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=array.dtype == object)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def survey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """17 labelled, named stamps; the pixels of row i are stamp(i)."""
    path = tmp_path_factory.mktemp("survey") / "survey.h5"
    return write_h5(
        path, np.stack([stamp(i) for i in range(NUM)]), labels=np.arange(NUM) % 3, obj_ids=900 + np.arange(NUM)
    )


@pytest.fixture(scope="module")
def packed(survey: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    dst = tmp_path_factory.mktemp("packed")
    return pack(hdf5.open_source(survey, "train"), dst, PackOptions(shard_size=6)).manifest


# The form of a stamp's file


@given(bands=st.integers(1, 8), height=st.integers(1, 40), width=st.integers(1, 40), seed=st.integers(0, 9))
def test_a_stamp_comes_back_as_it_went_in_and_numpy_reads_it_too(
    bands: int, height: int, width: int, seed: int
) -> None:
    pixels = stamp(seed, bands, height, width)
    data = stamps.encode(pixels)
    assert_array_equal(stamps.decode(data), pixels)
    assert_array_equal(np.load(io.BytesIO(data), allow_pickle=False), pixels)
    assert_array_equal(stamps.decode(saved(pixels)), pixels)


def test_the_bytes_of_a_stamp_are_fixed() -> None:
    data = stamps.encode([[[1.0, -2.0]]])
    text = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 2), }"
    assert data == b"\x93NUMPY\x01\x00v\x00" + text.ljust(117) + b"\n" + b"\0\0\x80?\0\0\0\xc0"


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, ">f4", np.float64, np.float16])
def test_other_numbers_and_orders_of_memory_become_float32(dtype: Any) -> None:
    pixels = np.arange(24).reshape(2, 3, 4).astype(dtype)
    assert stamps.encode(np.asfortranarray(pixels)) == stamps.encode(pixels.astype(np.float32))


def test_one_band_needs_no_axis_of_its_own() -> None:
    assert stamps.encode(stamp(1)[0]) == stamps.encode(stamp(1)[:1])


GOOD = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 3), }"
STRANGE = {
    "empty": b"",
    "cut": stamps.encode(stamp(1))[:-1],
    "cut in the header": stamps.encode(stamp(1))[:60],
    "longer than it says": stamps.encode(stamp(1)) + b"\0",
    "format 2.0": header(GOOD, b"\x02\x00") + bytes(24),
    "double": saved(stamp(1).astype(np.float64)),
    "big-endian": saved(stamp(1).astype(">f4")),
    "Fortran's order": saved(np.asfortranarray(stamp(1))),
    "two axes": saved(stamp(1)[0]),
    "four axes": saved(stamp(1)[None]),
    "a pickle": saved(np.array([[[print]]], dtype=object)),
    "a call": header(GOOD.replace("False", "print()")) + bytes(24),
    "a second line": header(GOOD + "\n__import__('os')") + bytes(24),
    "no pixels": header(GOOD.replace("(1, 2, 3)", "(1, 0, 3)")),
    "a claim of terabytes": header(GOOD.replace("(1, 2, 3)", "(5, 999999, 999999)")) + bytes(24),
    "bands last": header(GOOD.replace("(1, 2, 3)", "(96, 96, 5)")) + bytes(4 * 96 * 96 * 5),
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_file_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^it|^its"):
        stamps.decode(STRANGE[name])
    with pytest.raises(BadImage):
        inspect(STRANGE[name])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_stamp_that_is_not_finite_is_a_bad_image_without_facts(value: float) -> None:
    pixels = stamp(1)
    pixels[2, 3, 4] = value
    with pytest.raises(BadImage, match=r"^1 of its pixels are NaN or infinite$") as caught:
        inspect(stamps.encode(pixels))
    assert caught.value.facts is None


def test_a_value_beyond_float32_is_infinite() -> None:
    with pytest.raises(BadImage, match="NaN or infinite"):
        inspect(stamps.encode(np.full((1, 2, 2), 1e300)))


def test_a_stamp_is_not_shrunk() -> None:
    with pytest.raises(ShardError, match="shrink photographs, but these are stamps"):
        prepare(stamps.encode(stamp(1)), Resize(short_side=8))


# HDF5


def test_every_stamp_is_packed_with_its_label_and_name(packed: Manifest) -> None:
    index = packed.index()
    assert (packed.num_samples, packed.bands, packed.classes) == (NUM, 5, ("0", "1", "2"))
    assert packed.census["formats"] == {"npy": NUM}
    assert packed.census["quantiles"]["width"]["min"] == packed.census["quantiles"]["width"]["max"] == 14
    assert set(index["width"]) == {14}
    assert set(index["height"]) == {12}
    found = dict(zip(payloads(packed), index["label"].tolist()))
    assert found == {stamps.encode(stamp(i)): i % 3 for i in range(NUM)}


def test_a_name_goes_with_its_stamp(packed: Manifest, tmp_path: Path) -> None:
    for path in extract(packed, range(NUM), tmp_path):
        number = int(path.stem.split("_")[1]) - 900
        assert path.read_bytes() == stamps.encode(stamp(number))


def test_workers_and_repetition_change_no_byte(survey: Path, packed: Manifest, tmp_path: Path) -> None:
    again = pack(hdf5.open_source(survey, "train"), tmp_path, PackOptions(shard_size=6, workers=2)).manifest
    assert hashes(again.root) == hashes(packed.root)


def test_unlabelled_stamps_of_another_dataset_are_packed(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["des/cutouts"] = np.stack([stamp(i)[0] for i in range(3)])  # (N, H, W): one band
    manifest = pack(hdf5.open_source(tmp_path / "a.h5", "val", "des/cutouts"), tmp_path / "dst", PackOptions()).manifest
    assert (manifest.bands, manifest.classes, manifest.split) == (1, None, "val")
    assert set(payloads(manifest)) == {stamps.encode(stamp(i)[0]) for i in range(3)}


@pytest.mark.parametrize("names", [["spiral", "lens"], np.array([b"spiral", b"lens"])])
def test_classes_are_named_by_the_labels_attribute(tmp_path: Path, names: Any) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = np.zeros((2, 1, 4, 4))
        file["labels"] = [1, 0]
        file["labels"].attrs["classes"] = names
        file["obj_ids"] = ["DES J0001", "DES J0002"]
    source = hdf5.open_source(tmp_path / "a.h5", "train")
    assert source.classes == ("spiral", "lens")
    assert [item.name for item in source.items] == ["images/DES J0001", "images/DES J0002"]


@pytest.mark.parametrize(
    ("images", "beside", "what"),
    [
        (np.zeros((2, 3)), {}, "has no numbers 'images' of shape"),
        (np.zeros((2, 96, 96, 5), np.float32), {}, "the first axis must be the bands"),
        (np.zeros((2, 5, 4, 4)), {"labels": [0, 1, 2]}, "not one integer for each of 2 stamps"),
        (np.zeros((2, 5, 4, 4)), {"labels": [0.0, 1.0]}, "not one integer for each of 2 stamps"),
        (np.zeros((2, 5, 4, 4)), {"labels": [0, -5]}, "goes from -5 to 0"),
        (np.zeros((2, 5, 4, 4)), {"labels": [0, -1]}, "some samples have a label and others have none"),
        (np.zeros((2, 5, 4, 4)), {"obj_ids": [1]}, "not one name for each of 2 stamps"),
    ],
)
def test_a_file_of_another_layout_is_refused(tmp_path: Path, images: Any, beside: Any, what: str) -> None:
    with pytest.raises(ShardError, match=what):
        hdf5.open_source(write_h5(tmp_path / "a.h5", images, **beside), "train")


def test_the_same_names_with_other_pixels_are_another_pack(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_h5(tmp_path / f"{seed}.h5", np.stack([stamp(seed)] * 3))
    pack(hdf5.open_source(tmp_path / "1.h5", "train"), tmp_path / "dst", PackOptions())
    with pytest.raises(ShardError, match="holds a pack of other files or options"):
        pack(hdf5.open_source(tmp_path / "2.h5", "train"), tmp_path / "dst", PackOptions())


@pytest.mark.parametrize("on_bad", ["quarantine", "keep"])
def test_stamps_with_nan_are_left_out_and_listed(tmp_path: Path, on_bad: str) -> None:
    images = np.stack([stamp(i) for i in range(6)])
    images[4, 0, 0, 0] = np.nan
    source = hdf5.open_source(write_h5(tmp_path / "a.h5", images), "train")
    with pytest.raises(ShardError, match=r"^images/000000004 is no good image \(1 of its pixels are NaN or infinite\)"):
        pack(source, tmp_path / "dst", PackOptions())
    manifest = pack(source, tmp_path / "dst", PackOptions(on_bad=on_bad)).manifest
    assert manifest.num_samples == 5
    assert [(bad["name"], bad["action"]) for bad in manifest.census["bad"]] == [("images/000000004", "quarantined")]
    assert check(manifest, full=True) == []


def test_a_damaged_chunk_is_a_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        images = file.create_dataset("images", (4, 1, 32, 32), "<f4", chunks=(1, 1, 32, 32), fletcher32=True)
        images[:] = np.stack([stamp(i, 1, 32, 32) for i in range(4)])
        at = images.id.get_chunk_info(2).byte_offset
    data = bytearray(path.read_bytes())
    data[at + 100] ^= 1
    path.write_bytes(data)
    manifest = pack(hdf5.open_source(path, "train"), tmp_path / "dst", PackOptions(on_bad="quarantine")).manifest
    assert [bad["name"] for bad in manifest.census["bad"]] == ["images/000000002"]


# FITS


def test_fits_files_of_every_usual_form_are_packed(tmp_path: Path) -> None:
    wide, scaled = stamp(3), astropy_fits.PrimaryHDU(np.arange(168, dtype=np.int16).reshape(12, 14)[None].repeat(5, 0))
    scaled.header["BSCALE"], scaled.header["BZERO"] = 0.5, 3.0
    table = astropy_fits.BinTableHDU.from_columns([astropy_fits.Column("x", "E", array=np.ones(3))])
    files = {
        "field 1/a.fits": primary(stamp(0)),
        "field 1/b.FIT": primary(stamp(1).astype(np.float64)),
        "c.fts": fits_bytes(astropy_fits.PrimaryHDU(), table, astropy_fits.ImageHDU(stamp(2))),
        "d.fits.gz": gzip.compress(primary(wide)),
        "e.fits": fits_bytes(scaled),
        "README.txt": b"no stamp",
    }
    manifest = pack(fits.open_source(plant(tmp_path / "src", files), "train"), tmp_path / "dst", PackOptions()).manifest
    assert (manifest.num_samples, manifest.bands, manifest.source["num_ignored"]) == (5, 5, 1)
    counted = (np.arange(168).reshape(12, 14)[None].repeat(5, 0) * 0.5 + 3).astype(np.float32)
    assert set(payloads(manifest)) == {stamps.encode(pixels) for pixels in (*map(stamp, range(4)), counted)}


def test_a_compressed_image_is_read(tmp_path: Path) -> None:
    pixels = np.arange(24 * 30, dtype=np.int16).reshape(24, 30)
    data = fits_bytes(astropy_fits.PrimaryHDU(), astropy_fits.CompImageHDU(pixels, compression_type="RICE_1"))
    source = fits.open_source(plant(tmp_path / "src", {"a.fits.fz": data}), "train")
    manifest = pack(source, tmp_path / "dst", PackOptions()).manifest
    assert payloads(manifest) == [stamps.encode(pixels)]


BAD_FITS = {
    "cut": primary(stamp(0))[:3000],
    "cut-header": primary(stamp(0))[:1000],
    "empty": b"",
    "cut-gzip": gzip.compress(primary(stamp(0)))[:-400],
    "text": b"SIMPLE but not FITS",
    "jpeg": jpeg(1),
    "table": fits_bytes(astropy_fits.PrimaryHDU()),
    "cube-of-cubes": primary(np.zeros((2, 2, 4, 4))),
    "line": primary(np.zeros(9)),
    "nan": primary(np.full((5, 4, 4), np.nan)),
    "huge": primary(np.zeros((5, 4, 4))).replace(b"NAXIS1  =                    4", b"NAXIS1  =            999999999"),
}


@pytest.mark.parametrize("name", BAD_FITS)
def test_a_damaged_fits_file_is_a_bad_image(tmp_path: Path, name: str) -> None:
    src = plant(tmp_path / "src", {"good.fits": primary(stamp(0)), f"{name}.fits": BAD_FITS[name]})
    source = fits.open_source(src, "train")
    with pytest.raises(ShardError, match=rf"^{name}\.fits is no good image \(.+\); [^\n]+--on-bad quarantine$"):
        pack(source, tmp_path / "dst", PackOptions())
    manifest = pack(source, tmp_path / "dst", PackOptions(on_bad="quarantine")).manifest
    assert [bad["name"] for bad in manifest.census["bad"]] == [f"{name}.fits"]


def test_stamps_of_other_bands_are_refused_and_named(tmp_path: Path) -> None:
    src = plant(tmp_path / "src", {f"{bands}.fits": primary(stamp(0, bands)) for bands in (3, 5)})
    with pytest.raises(ShardError, match=r"^[35]\.fits has [35] bands, but those before [35] bands; pack them apart$"):
        pack(fits.open_source(src, "train"), tmp_path / "dst", PackOptions(shard_size=1))


def test_stamps_of_other_sizes_are_packed_together(tmp_path: Path) -> None:
    files = {f"{side}.fits": primary(stamp(0, 2, side, side + 1)) for side in (8, 9)}
    manifest = pack(fits.open_source(plant(tmp_path / "src", files), "train"), tmp_path / "dst", PackOptions()).manifest
    assert sorted(zip(manifest.index()["height"].tolist(), manifest.index()["width"].tolist())) == [(8, 9), (9, 10)]


# What the shards are to others


def test_good_shards_have_no_fault(packed: Manifest) -> None:
    assert check(packed, full=True, workers=2) == []


@pytest.fixture
def copied(packed: Manifest, tmp_path: Path) -> Manifest:
    """A copy that a test may damage."""
    shutil.copytree(packed.root, tmp_path / "copy" / "train")
    return Manifest.load(tmp_path / "copy")


def test_a_flipped_bit_in_a_stamp_is_found_by_its_name(copied: Manifest) -> None:
    path = copied.shard_path(1)
    row = copied.index()[7]
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) + 500] ^= 4
    path.write_bytes(data)
    assert check(copied) == []
    faults = check(copied, full=True)
    assert any(fault == "train-000001.tar:000000007.npy is damaged (its crc32 differs)" for fault in faults)


def test_a_manifest_of_other_bands_than_its_stamps_is_found(copied: Manifest) -> None:
    census = {**copied.census, "bands": 4}
    (copied.root / "manifest.json").write_bytes(replace(copied, census=census).to_bytes())
    faults = check(Manifest.load(copied.root), decode=True)
    assert "train-000000.tar:000000000.npy has 5 bands, but the manifest says 4" in faults


@pytest.mark.parametrize("bands", [0, -1, 65, "5", True])
def test_a_manifest_with_impossible_bands_is_refused(copied: Manifest, bands: Any) -> None:
    path = copied.root / "manifest.json"
    path.write_text(path.read_text().replace('"bands": 5', f'"bands": {json.dumps(bands)}'))
    with pytest.raises(ShardError, match="is no manifest of version 1"):
        Manifest.load(copied.root)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_the_webdataset_package_reads_stamps_and_labels(packed: Manifest) -> None:
    paths = [str(packed.shard_path(i)) for i in range(len(packed.shards))]
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert len(samples) == NUM
    for sample, data, label in zip(samples, payloads(packed), packed.index()["label"]):
        assert_array_equal(sample["npy"], stamps.decode(data))
        assert sample["cls"] == label
        assert (sample["json"]["width"], sample["json"]["height"]) == (14, 12)
    gc.collect()


def test_shards_of_stamps_are_packed_again(packed: Manifest, tmp_path: Path) -> None:
    manifest = pack(shards.open_source(str(packed.root), "train"), tmp_path, PackOptions(seed=4)).manifest
    assert (manifest.bands, manifest.classes) == (5, packed.classes)
    assert sorted(payloads(manifest)) == sorted(payloads(packed))


def test_shards_of_stamps_are_adopted(packed: Manifest, tmp_path: Path) -> None:
    for i in range(len(packed.shards)):
        shutil.copy(packed.shard_path(i), tmp_path)
    (manifest,) = adopt(tmp_path, AdoptOptions())
    assert manifest.bands == 5
    assert_array_equal(manifest.index(), packed.index())
    assert check(manifest, full=True) == []


def test_an_array_beside_a_photograph_is_no_stamp(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("0.npy", stamps.encode(stamp(0))), ("0.jpg", jpeg(1))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (manifest,) = adopt(tmp_path, AdoptOptions())
    assert (manifest.bands, payloads(manifest)) == (0, [jpeg(1)])


def test_an_interrupted_pack_continues_and_remembers_the_bands(survey: Path, packed: Manifest, tmp_path: Path) -> None:
    shutil.copytree(packed.root, tmp_path / "train")
    kill = (
        "import sys, os, signal\nfrom shard_tools import cli, disk\nfrom shard_tools.journal import Journal\n"
        "old = Journal.append\n"
        "def append(self, entry):\n    old(self, entry)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "Journal.append = append\ncli.main(sys.argv[1:])\n"
    )
    words = ["pack", "hdf5", str(survey), str(tmp_path / "dst"), "--shard-size", "6", "--workers", "1"]
    assert subprocess.run([sys.executable, "-c", kill, *words], capture_output=True, check=False).returncode == -9
    assert (tmp_path / "dst" / "train" / "pack.journal").is_file()
    done = shell(*words)
    assert "continued behind 1 complete shard" in done.stdout
    assert hashes(tmp_path / "dst" / "train") == hashes(packed.root)


# The simulated survey


def test_a_galaxy_depends_on_seed_and_number_only(tmp_path: Path) -> None:
    galaxies.simulate(tmp_path / "a.h5", num=18, size=32, seed=3, workers=2)  # 16 for one worker, 2 for the other
    with h5py.File(tmp_path / "a.h5") as file:
        for number in (17, 0, 5):
            pixels, label = galaxies.galaxy(3, 32, number)
            assert_array_equal(file["images"][number], pixels)
            assert file["labels"][number] == label
        assert len(np.unique(file["images"][:, 0, 0, 0])) == 18
    assert not np.array_equal(galaxies.galaxy(3, 32, 0)[0], galaxies.galaxy(4, 32, 0)[0])


def test_simulated_stamps_are_galaxies_on_a_sky_around_0() -> None:
    pixels = np.stack([galaxies.galaxy(0, 96, number)[0] for number in range(12)])
    assert pixels.dtype == np.float32
    assert np.isfinite(pixels).all()
    sky, middle = pixels[:, :, :8], pixels[:, :, 44:52, 44:52]
    assert 0.45 < (sky <= 0).mean() < 0.52  # light of the outskirts lifts the sky a little
    assert (middle.mean(axis=(1, 2, 3)) > 10 * np.abs(sky.mean(axis=(1, 2, 3)))).all()


def test_the_road_from_simulation_to_shards_runs_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, dst, alone = str(tmp_path / "galaxies.h5"), str(tmp_path / "dst"), ("--workers", "1")
    assert cli.main(["simulate", "galaxies", out, "--num", "6", "--size", "32", *alone]) == 0
    assert cli.main(["simulate", "galaxies", out, "--num", "6", *alone]) == 2
    assert capsys.readouterr().err.startswith(f"error: {out} is there already")
    assert cli.main(["pack", "hdf5", out, dst, *alone]) == 0
    assert cli.main(["verify", dst, "--full", *alone]) == 0
    assert cli.main(["info", dst]) == 0
    assert "npy 6" in capsys.readouterr().out
    assert cli.main(["pack", "hdf5", f"{out}.not", dst, *alone]) == 2
    assert capsys.readouterr().err == f"error: no such file: {out}.not; give the HDF5 file with the stamps as SRC\n"
    assert cli.main(["pack", "hdf5", f"{dst}/train/index.npy", f"{dst}2", *alone]) == 2
    assert "index.npy is damaged, or no HDF5 file; check SRC" in capsys.readouterr().err
    manifest = Manifest.load(tmp_path / "dst")
    assert (manifest.num_samples, manifest.bands) == (6, 5)
    assert set(manifest.classes or ()) <= set(galaxies.CLASSES)


@pytest.mark.parametrize(("key", "value"), [("num", 0), ("size", 0), ("size", 2000), ("seed", -1)])
def test_an_impossible_survey_is_refused(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises(ShardError, match=f"^--{key} is {value}, but must be"):
        galaxies.simulate(tmp_path / "a.h5", **{"num": 1, key: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["h5py", "astropy", "galsim"])
def test_a_missing_package_is_one_sentence_with_its_extra(
    tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    actions = {
        "h5py": lambda: hdf5.open_source(tmp_path / "a.h5", "train"),
        "astropy": lambda: fits.open_source(tmp_path, "train"),
        "galsim": lambda: galaxies.simulate(tmp_path / "a.h5", num=1),
    }
    with pytest.raises(ShardError, match=rf"needs {package}; run `pip install 'fastssl-train\[astronomy\]'`$"):
        actions[package]()
