"""Every kind of damaged, foreign or hostile file meets the strict decode, and on_bad decides what becomes of it."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shard_tools.headers import FORMATS
from shard_tools.images import BadImage, inspect, prepare
from shard_tools.manifest import Manifest, ShardError
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import files
from tests.faults.memory import forget_peak, resident_mb
from tests.shard_tools.builders import ROOT, encode, jpeg, payloads, picture, plant

GOOD = jpeg(1, (64, 48))
PNG = encode(picture(1, (64, 48)), "PNG")


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + b"\0\0\0\0IEND\xaeB`\x82"


def zeroed(data: bytes, marker: bytes) -> bytes:
    """`data` with the 60 bytes behind a JPEG marker wiped."""
    at = data.index(marker) + 2
    return data[:at] + bytes(60) + data[at + 60 :]


BAD = {
    "cut-10.jpg": GOOD[: len(GOOD) // 10],
    "cut-50.jpg": GOOD[: len(GOOD) // 2],
    "cut-90.jpg": GOOD[: len(GOOD) * 9 // 10],
    "cut-last-2.jpg": GOOD[:-2],
    "empty.jpg": b"",
    "one-byte.jpg": b"\xff",
    "soi-only.jpg": b"\xff\xd8",
    "text.jpg": b"This was never a picture.\n",
    "missing.jpg": b"<html><body>404 Not Found</body></html>",
    "wiped-tables.jpg": zeroed(GOOD, b"\xff\xdb"),
    "noise.jpg": b"\xff\xd8\xff\xe0" + np.random.default_rng(0).bytes(3000),
    "cut.png": PNG[: len(PNG) // 2],
    "animation.gif": encode(picture(2), "GIF"),
    "scan.tif": encode(picture(2), "TIFF"),
    "bomb.png": png_header(16000, 16000),
    "bomb.jpg": GOOD.replace(GOOD[GOOD.index(b"\xff\xc0") + 5 :][:4], struct.pack(">HH", 20000, 20000), 1),
}

ACCEPTED = {
    "trailing.jpg": GOOD + b"some bytes behind the end",
    "gray.jpg": encode(picture(3, mode="L")),
    "cmyk.jpg": encode(picture(3, mode="CMYK")),
    "progressive.jpg": encode(picture(3), progressive=True),
    "png-named.JPEG": encode(picture(3), "PNG"),
    "palette.png": encode(picture(3).convert("P"), "PNG"),
    "rgba.png": encode(picture(3, mode="RGBA"), "PNG"),
    "photo.webp": encode(picture(3), "WEBP"),
    "old.bmp": encode(picture(3), "BMP"),
    "dot.png": encode(picture(3, (1, 1)), "PNG"),
    "line.jpg": encode(picture(3, (1, 500))),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_stops_a_pack_with_a_sentence_that_names_it(tmp_path: Path, name: str) -> None:
    src = plant(tmp_path / "src", {name: BAD[name]})
    with pytest.raises(ShardError, match=rf"^{name} is no good image \(.+\); .+--on-bad quarantine$"):
        pack(files.open_source(src, "train"), tmp_path / "dst", PackOptions())


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_unusual_but_whole_image_is_packed_byte_for_byte(tmp_path: Path, name: str) -> None:
    src = plant(tmp_path / "src", {name: ACCEPTED[name]})
    manifest = pack(files.open_source(src, "train"), tmp_path / "dst", PackOptions()).manifest
    assert payloads(manifest) == [ACCEPTED[name]]


def test_quarantine_leaves_exactly_the_bad_files_out_and_lists_each_with_its_reason(tmp_path: Path) -> None:
    good = {f"good{i}.jpg": jpeg(i) for i in range(20)}
    src = plant(tmp_path / "src", {**good, **BAD})
    (src / "broken-link.jpg").symlink_to("nowhere.jpg")
    options = PackOptions(shard_size=3, on_bad="quarantine")
    manifest = pack(files.open_source(src, "train"), tmp_path / "dst", options).manifest
    expected = {*BAD, "broken-link.jpg"}
    assert sorted(payloads(manifest)) == sorted(good.values())
    assert {bad["name"] for bad in manifest.census["bad"]} == expected
    assert all(bad["action"] == "quarantined" and bad["reason"] for bad in manifest.census["bad"])
    lines = (tmp_path / "dst/train/quarantine.txt").read_text().splitlines()
    assert {line.split("\t")[0] for line in lines} == expected
    assert "0x" not in "".join(lines)  # an address would differ from run to run
    assert Manifest.load(tmp_path / "dst").check_quick() == []


def test_keep_packs_what_has_a_readable_header_and_quarantines_the_rest(tmp_path: Path) -> None:
    src = plant(tmp_path / "src", {"a.jpg": jpeg(1), "cut.jpg": BAD["cut-50.jpg"], "text.jpg": BAD["text.jpg"]})
    manifest = pack(files.open_source(src, "train"), tmp_path / "dst", PackOptions(on_bad="keep")).manifest
    actions = {bad["name"]: bad["action"] for bad in manifest.census["bad"]}
    assert actions == {"cut.jpg": "kept", "text.jpg": "quarantined"}
    kept = next(bad for bad in manifest.census["bad"] if bad["action"] == "kept")["row"]
    assert payloads(manifest)[kept] == BAD["cut-50.jpg"]
    assert tuple(manifest.index()[kept])[-2:] == (64, 48)


def test_a_source_of_bad_files_only_is_refused(tmp_path: Path) -> None:
    src = plant(tmp_path / "src", BAD)
    with pytest.raises(ShardError, match=r"none of the .* is a usable image"):
        pack(files.open_source(src, "train"), tmp_path / "dst", PackOptions(on_bad="quarantine"))


def test_after_a_failure_the_remedy_in_its_message_continues_behind_the_shards_already_written(tmp_path: Path) -> None:
    contents = {f"good{i}.jpg": jpeg(i) for i in range(12)}
    src = plant(tmp_path / "src", {**contents, "bad.jpg": b"no"})
    source = files.open_source(src, "train")
    with pytest.raises(ShardError, match="on-bad quarantine"):
        pack(source, tmp_path / "dst", PackOptions(shard_size=1, seed=3))
    packed = pack(source, tmp_path / "dst", PackOptions(shard_size=1, seed=3, on_bad="quarantine"))
    assert packed.num_shards_kept > 0
    assert packed.manifest.num_samples == 12


def test_the_census_is_taken_from_content(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    contents = {
        **ACCEPTED,
        "turned.jpg": encode(picture(5), exif=exif),
        "bad-exif.jpg": encode(picture(5), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"),
    }
    src = plant(tmp_path / "src", contents)
    census = pack(files.open_source(src, "train"), tmp_path / "dst", PackOptions()).manifest.census
    assert census["formats"] == {"bmp": 1, "jpeg": 7, "png": 4, "webp": 1}
    assert census["modes"] == {"CMYK": 1, "L": 1, "P": 1, "RGB": 9, "RGBA": 1}
    assert census["exif_orientation"] == {"6": 1}
    assert census["corrupt_exif"] == 1
    assert {tuple(oddity) for oddity in census["oddities"]} == {
        ("bad-exif.jpg", "corrupt EXIF"),
        ("cmyk.jpg", "mode CMYK"),
        ("palette.png", "mode P"),
        ("png-named.JPEG", "png named .jpeg"),
        ("rgba.png", "mode RGBA"),
        ("turned.jpg", "EXIF orientation 6"),
    }


def test_sixteen_bit_grey_is_stored_in_eight_scaled_not_clipped() -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    prepared = prepare(encode(Image.fromarray(ramp), "PNG"), None)
    stored = np.asarray(Image.open(io.BytesIO(prepared.payload)))
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored, (ramp // 257).astype(np.uint8))


def test_an_orientation_tag_is_reported_and_the_size_is_that_of_the_stored_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    facts = inspect(encode(picture(1, (40, 30)), exif=exif))
    assert (facts.width, facts.height, facts.orientation) == (40, 30, 6)


@pytest.mark.parametrize("name", ["bomb.png", "bomb.jpg"])
def test_a_decompression_bomb_is_refused_from_its_header_without_memory(name: str) -> None:
    forget_peak()
    before = resident_mb()
    with pytest.raises(BadImage, match="bomb"):
        inspect(BAD[name])
    assert resident_mb("VmHWM") - before < 64


def test_the_limit_of_pixels_holds_although_other_code_lifted_pillows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(BadImage, match="16000x16000 px are more than 178956970"):
        inspect(BAD["bomb.png"])


def test_a_file_larger_than_a_member_may_be_is_not_read_whole(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with (tmp_path / "src/huge.jpg").open("wb") as file:
        file.write(GOOD)
        file.truncate(3 * 2**30)  # a hole; reading it would need 3 GiB
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30));"
        "from shard_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command: list[Any] = [sys.executable, "-c", code, "pack", "files", tmp_path / "src", tmp_path / "dst"]
    command += ["--workers", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert "larger than 67108864 bytes" in done.stderr


def test_metadata_of_a_quarantined_pack_survives_json(tmp_path: Path) -> None:
    src = plant(tmp_path / "src", {"good.jpg": jpeg(1), "tab\tand\nline.jpg": b"bad"})
    pack(files.open_source(src, "train"), tmp_path / "dst", PackOptions(on_bad="quarantine"))
    document = json.loads((tmp_path / "dst/train/manifest.json").read_bytes())
    assert document["census"]["bad"][0]["name"] == "tab\tand\nline.jpg"
    assert (tmp_path / "dst/train/quarantine.txt").read_text().count("\n") == 1


@pytest.mark.parametrize("options", [{}, {"subsampling": 2}, {"progressive": True}, {"restart_marker_blocks": 7}])
def test_a_fault_of_a_jpeg_is_found_as_by_a_whole_decode(options, photos):
    """A pack keeps a file's bytes, so it reads all codes of a JPEG but makes few pixels of them."""
    file = io.BytesIO()
    photos[1].resize((150, 113)).save(file, "JPEG", quality=85, **options)
    rng = np.random.default_rng(3)
    outcomes = []
    for _ in range(400):
        data = bytearray(file.getvalue())
        for place in rng.integers(len(data), size=rng.integers(1, 4)):
            data[place] = rng.integers(256)
        data = bytes(data[: rng.integers(1, len(data))] if rng.integers(6) == 0 else data)
        ours, whole = "", ""
        try:
            inspect(data)
        except BadImage as error:
            ours = str(error)
        try:
            Image.open(io.BytesIO(data), formats=FORMATS).load()
        except (OSError, SyntaxError, ValueError) as error:
            whole = str(error)
        assert bool(ours) == bool(whole) or "two sizes" in ours  # to which Pillow has no objection
        outcomes.append(bool(whole))
    assert 20 < sum(outcomes) < 380
