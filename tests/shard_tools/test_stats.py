"""`shard_tools info --stats`: mean and standard deviation of all pixels, against NumPy on the decoded images."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shard_tools.cli import main
from shard_tools.info import pixel_statistics
from shard_tools.manifest import Manifest, ShardError
from tests.shard_tools.builders import encode, jpeg, payloads, picture, plant
from tests.shards import write_split


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """150 images of many sizes, colour modes and formats: more than two tasks, in shards of 20."""
    files = [("jpg", jpeg(i, (9 + i % 13, 8 + i % 7))) for i in range(147)]
    files += [("png", encode(picture(i, (50, 40), mode), "PNG")) for i, mode in enumerate(("L", "RGBA", "P"))]
    return write_split(tmp_path_factory.mktemp("mixed"), files)


def expected(images: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Over all pixels of all images, in two passes of float64."""
    decoded = [np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).reshape(-1, 3) for image in images]
    pixels = np.concatenate(decoded).astype(np.float64) / 255
    return pixels.mean(axis=0), pixels.std(axis=0)


@pytest.mark.parametrize("workers", [1, 2])
def test_statistics_are_numpys_over_all_pixels(mixed: Manifest, workers: int) -> None:
    found = pixel_statistics(mixed, workers=workers)
    mean, std = expected(payloads(mixed))
    np.testing.assert_allclose(found["mean"], mean, atol=5.1e-7)  # rounded to six digits
    np.testing.assert_allclose(found["std"], std, atol=5.1e-7)
    assert found["num_images"] == 150
    assert found["num_pixels"] == int((mixed.index()["width"] * mixed.index()["height"]).sum())


def test_every_pixel_weighs_the_same_whatever_the_size_of_its_image(tmp_path: Path) -> None:
    images = [Image.new("RGB", (2, 5), "black"), Image.new("RGB", (5, 6), "white")]
    files = [("png", encode(image, "PNG")) for image in images]
    found = pixel_statistics(write_split(tmp_path, files))
    assert found == {"num_images": 2, "num_pixels": 40, "mean": [0.75] * 3, "std": [0.433013] * 3}  # sqrt(3)/4


def test_a_limit_measures_the_same_random_images_every_time(mixed: Manifest) -> None:
    first, again = pixel_statistics(mixed, limit=20), pixel_statistics(mixed, limit=20)
    assert first == again
    assert first["num_images"] == 20
    areas = mixed.index()["width"] * mixed.index()["height"]
    assert first["num_pixels"] != areas[:20].sum()
    assert pixel_statistics(mixed, limit=10**6) == pixel_statistics(mixed)


def test_the_command_prints_settings_to_paste(mixed: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(mixed.root), "--stats", "--workers", "1"]) == 0
    mean, std = expected(payloads(mixed))
    numbers = [",".join(f"{value:.4f}" for value in values) for values in (mean, std)]
    assert f"\ndata.mean=[{numbers[0]}] data.std=[{numbers[1]}]\n" in capsys.readouterr().out
    assert main(["info", str(mixed.root), "--stats", "--json", "--workers", "1"]) == 0
    (split,) = json.loads(capsys.readouterr().out)["splits"]
    assert split["pixels"] == pixel_statistics(mixed)


def test_without_the_option_no_image_is_read(mixed: Manifest, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(mixed.root), "--json"]) == 0
    assert "pixels" not in json.loads(capsys.readouterr().out)["splits"][0]


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("damage", ["bytes", "image"])
def test_a_damaged_image_is_named_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str, workers: str
) -> None:
    """One bit that rotted in the shard, or a file that was whole in the shard and never decoded."""
    files = [("jpg", jpeg(i)) for i in range(30)]
    if damage == "image":
        files[25] = ("jpg", files[25][1][:300])
    manifest = write_split(tmp_path, files)
    if damage == "bytes":
        row = manifest.index()[25]
        with manifest.shard_path(1).open("r+b") as file:
            file.seek(int(row["offset"]) + 200)
            file.write(b"\x55\xaa")
    assert main(["info", str(tmp_path), "--stats", "--workers", workers]) == (7 if damage == "bytes" else 2)
    captured = capsys.readouterr()
    assert captured.out == ""
    what = r"is damaged \(its crc32 differs\)" if damage == "bytes" else r"cannot be decoded \(.*\)"
    assert re.fullmatch(rf"error: train-000001\.tar:000000025\.jpg {what}; [^\n]+\n", captured.err)


def test_images_that_were_kept_though_they_do_not_decode_are_left_out(tmp_path: Path) -> None:
    plant(tmp_path / "src", {"good.jpg": jpeg(1), "half.jpg": jpeg(2)[:-200]})
    words = ["pack", "files", str(tmp_path / "src"), str(tmp_path / "dst"), "--on-bad", "keep", "--workers", "1"]
    assert main(words) == 0
    found = pixel_statistics(Manifest.load(tmp_path / "dst"))
    assert found["num_images"] == 1
    np.testing.assert_allclose(found["mean"], expected([jpeg(1)])[0], atol=5.1e-7)
    (tmp_path / "src" / "good.jpg").unlink()
    assert main([*words, "--overwrite"]) == 0
    with pytest.raises(ShardError, match="has no image that decodes"):
        pixel_statistics(Manifest.load(tmp_path / "dst"))


def test_stamps_are_refused(mixed: Manifest) -> None:
    with pytest.raises(ShardError, match="holds stamps, but --stats is for photographs"):
        pixel_statistics(replace(mixed, census={"bands": 5}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stats", "--limit", "-1"], r"--limit is -1, but must be a number of images"),
        (["--limit", "5"], r"--limit only matters to --stats"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    mixed: Manifest, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["info", str(mixed.root), *words]) == 2
    assert re.fullmatch(rf"error: {message}.*\n", capsys.readouterr().err)
