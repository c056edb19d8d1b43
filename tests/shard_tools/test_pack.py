"""Packing: what goes in comes out, the same input gives the same bytes, and the options do what they say."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shard_tools.images import Resize
from shard_tools.manifest import Manifest, ShardError
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import Item, Source, files, imagefolder
from tests.shard_tools.builders import class_tree, encode, hashes, jpeg, payloads, picture, plant

HOSTILE = [
    "a b.jpg",
    "new\nline.jpg",
    "tab\t.jpg",
    "$(touch canary).jpg",
    "-rf.jpg",
    "quote'\".jpg",
    "back\\slash.jpg",
    "dots.in.name.jpg",
    "\u00fcml\u00e4ut-\u732b-\U0001f408.jpg",
    "x" * 240 + ".jpg",
    "deep/" * 40 + "leaf.jpg",
    "; rm .jpg",
    "%s%n.jpg",
    "CON.JPEG",
]


def members(manifest: Manifest) -> dict[str, bytes]:
    found = {}
    for number in range(len(manifest.shards)):
        with tarfile.open(manifest.shard_path(number), "r:") as archive:
            for entry in archive:
                file = archive.extractfile(entry)
                assert file is not None
                found[entry.name] = file.read()
    return found


def from_memory(contents: dict[str, bytes]) -> Source:
    """A source that lives in this process."""
    items = [Item(name, -1, len(data)) for name, data in sorted(contents.items())]
    return Source("files", "train", items, None, lambda item: contents[item.name])


class TwoWide:
    """An engine that says it runs two tasks at once, and notes of how many images each piece is made."""

    width = 2
    is_remote = False

    def __init__(self) -> None:
        self.pieces: list[int] = []

    def in_order(self, work: Any, tasks: Any, idle: Any = None) -> Any:
        for task in tasks:
            if idle is None:
                self.pieces.append(len(task.items))
            yield work(task)


def test_hostile_file_names_come_back_from_the_metadata_and_never_as_member_names(tmp_path: Path) -> None:
    contents = {name: jpeg(seed) for seed, name in enumerate(HOSTILE)}
    src = plant(tmp_path / "src", contents)
    manifest = pack(files.open_source(src, "train"), tmp_path / "dst", PackOptions(shard_size=4)).manifest
    found = members(manifest)
    assert all(name.isascii() and len(name) == len("000000000.jpg") for name in found if name.endswith(".jpg"))
    names = {row: json.loads(found[f"{row:09d}.json"])["name"] for row in range(len(contents))}
    assert sorted(names.values()) == sorted(contents)
    assert {name: found[f"{row:09d}.jpg"] for row, name in names.items()} == contents
    assert not (tmp_path / "canary").exists()
    assert not Path("canary").exists()


def test_a_file_name_that_is_no_unicode_is_packed_with_its_bytes_spelt_out(tmp_path: Path) -> None:
    folder = bytes(tmp_path / "src") + b"/na\xefve"
    os.makedirs(folder)
    with open(folder + b"/caf\xe9.jpg", "wb") as file:
        file.write(jpeg(1))
    manifest = pack(imagefolder.open_source(tmp_path / "src", "train"), tmp_path / "dst", PackOptions()).manifest
    meta = json.loads(members(manifest)["000000000.json"])
    assert (meta["name"], meta["class"]) == ("na\\xefve/caf\\xe9.jpg", "na\\xefve")
    assert Manifest.load(tmp_path / "dst").classes == ("na\\xefve",)


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(
        st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=80),
        min_size=1,
        max_size=9,
        unique=True,
    ),
    padding=st.lists(st.binary(max_size=1500), min_size=9, max_size=9),
    shard_size=st.integers(1, 10),
    shard_bytes=st.sampled_from([0, 4000, 20000]),
)
def test_pack_then_read_returns_the_same_bytes_for_any_name_and_size(
    names: list[str], padding: list[bytes], shard_size: int, shard_bytes: int
) -> None:
    contents = {name: jpeg(i) + padding[i] for i, name in enumerate(names)}  # bytes behind the end are allowed
    with tempfile.TemporaryDirectory() as folder:
        options = PackOptions(shard_size=shard_size, shard_bytes=shard_bytes)
        manifest = pack(from_memory(contents), Path(folder), options).manifest
        assert Manifest.load(folder).check_quick() == []
        stored = members(manifest)
        by_row = {json.loads(stored[f"{row:09d}.json"])["name"]: data for row, data in enumerate(payloads(manifest))}
        assert by_row == contents
        assert {name: stored[f"{row:09d}.jpg"] for row, name in enumerate(by_row)} == by_row
        assert all(shard.num_samples <= shard_size for shard in manifest.shards)
        if shard_bytes:
            assert all(shard.num_bytes <= shard_bytes or shard.num_samples == 1 for shard in manifest.shards)


def test_a_piece_is_a_shard_until_there_is_not_one_left_for_each_worker(tmp_path: Path) -> None:
    source = from_memory({f"{number:03d}.jpg": jpeg(number, (8, 8)) for number in range(200)})
    one = pack(source, tmp_path / "one", PackOptions(shard_size=40))
    engine = TwoWide()
    two = pack(source, tmp_path / "two", PackOptions(shard_size=40), nullcontext(engine))
    assert engine.pieces == [40, 40, 40, 40, 16, 16, 8]
    assert hashes(one.manifest.root) == hashes(two.manifest.root)


def test_the_same_input_gives_the_same_bytes_with_one_and_two_workers_and_from_another_place(tmp_path: Path) -> None:
    first = class_tree(tmp_path / "a")
    second = class_tree(tmp_path / "elsewhere" / "b")
    options: dict[str, Any] = {"shard_size": 4, "resize": Resize(short_side=12)}
    one = pack(imagefolder.open_source(first, "train"), tmp_path / "one", PackOptions(workers=1, **options))
    pack(imagefolder.open_source(second, "train"), tmp_path / "two", PackOptions(workers=2, **options))
    assert len(one.manifest.shards) == 6
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_nothing_written_names_the_machine_the_place_or_the_time(tmp_path: Path) -> None:
    src = class_tree(tmp_path / "some-private-place")
    pack(imagefolder.open_source(src, "train"), tmp_path / "dst", PackOptions())
    everything = b"".join(path.read_bytes() for path in (tmp_path / "dst").rglob("*") if path.is_file())
    assert b"some-private-place" not in everything
    with tarfile.open(tmp_path / "dst/train/train-000000.tar") as archive:
        assert {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode) for e in archive} == {(0, 0, 0, "", "", 0o644)}


def test_the_shuffle_is_global_seeded_and_loses_nothing(tmp_path: Path) -> None:
    src = class_tree(tmp_path / "src", per_class=40)

    def labels(seed: int) -> list[int]:
        options = PackOptions(shard_size=40, seed=seed)
        packed = pack(imagefolder.open_source(src, "train"), tmp_path / f"dst{seed}", options)
        return packed.manifest.index()["label"].tolist()

    zero, one = labels(0), labels(1)
    assert zero != one
    assert sorted(zero) == sorted(one) == sorted([0, 1, 2] * 40)
    assert all(len(set(zero[first : first + 40])) == 3 for first in (0, 40, 80))  # every shard holds every class


def test_the_order_of_a_seed_never_changes(tmp_path: Path) -> None:
    """A golden value: an update of NumPy that moved it would make every re-run pack other bytes."""
    manifest = pack(from_memory({f"{name}.jpg": jpeg(1) for name in "abcdefgh"}), tmp_path, PackOptions()).manifest
    stored = members(manifest)
    assert "".join(json.loads(stored[f"{row:09d}.json"])["name"][0] for row in range(8)) == "acbfedgh"


def test_original_bytes_are_kept_and_index_and_labels_agree_with_the_tar(tmp_path: Path) -> None:
    src = class_tree(tmp_path / "src")
    manifest = pack(imagefolder.open_source(src, "train"), tmp_path / "dst", PackOptions(shard_size=5)).manifest
    stored = members(manifest)
    for row, (entry, payload) in enumerate(zip(manifest.index(), payloads(manifest))):
        meta = json.loads(stored[f"{row:09d}.json"])
        assert payload == (src / meta["name"]).read_bytes()
        assert int(stored[f"{row:09d}.cls"]) == entry["label"]
        assert manifest.classes is not None
        assert meta["class"] == manifest.classes[entry["label"]] == meta["name"].partition("/")[0]
        size = Image.open(io.BytesIO(payload)).size
        assert (meta["width"], meta["height"]) == (entry["width"], entry["height"]) == size
        assert manifest.member_name(row) == f"train-{row // 5:06d}.tar:{row:09d}.jpg"


def test_unlabelled_data_has_no_cls_members_and_label_minus_one(tmp_path: Path) -> None:
    src = class_tree(tmp_path / "src")
    manifest = pack(files.open_source(src, "train"), tmp_path / "dst", PackOptions()).manifest
    assert not manifest.labelled
    assert set(manifest.index()["label"].tolist()) == {-1}
    assert not any(name.endswith(".cls") for name in members(manifest))


@pytest.mark.parametrize(
    ("resize", "stored", "expected"),
    [
        (Resize(max_side=50), (200, 100), (50, 25)),
        (Resize(short_side=50), (200, 100), (100, 50)),
        (Resize(short_side=50), (100, 201), (50, 100)),
        (Resize(max_side=1), (200, 1), (1, 1)),
        (Resize(max_side=500), (200, 100), (200, 100)),
        (Resize(short_side=100), (200, 100), (200, 100)),
    ],
)
def test_a_resize_shrinks_to_the_side_asked_for_and_never_enlarges(
    tmp_path: Path, resize: Resize, stored: tuple[int, int], expected: tuple[int, int]
) -> None:
    original = jpeg(3, stored)
    manifest = pack(from_memory({"a.jpg": original}), tmp_path, PackOptions(resize=resize)).manifest
    row = manifest.index()[0]
    assert (row["width"], row["height"]) == expected
    assert (payloads(manifest)[0] == original) == (expected == stored)
    assert manifest.census["reencoded"] == (expected != stored)


def test_a_resize_is_antialiased_and_keeps_no_metadata_of_the_source(tmp_path: Path) -> None:
    checkers = Image.fromarray(
        ((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8)
    )  # a grid that aliasing breaks
    data = encode(checkers, "JPEG", quality=95, comment=b"secret", icc_profile=b"secret-profile")
    manifest = pack(
        from_memory({"a.jpg": data}), tmp_path, PackOptions(resize=Resize(max_side=16, quality=95))
    ).manifest
    small = Image.open(io.BytesIO(payloads(manifest)[0]))
    pixels = np.asarray(small, float)
    assert small.mode == "L"
    assert small.size == (16, 16)
    assert abs(pixels.mean() - 127.5) < 2
    assert pixels.std() < 4  # subsampling would give 0 and 255
    assert b"secret" not in payloads(manifest)[0]


def test_limit_packs_a_random_part_and_a_subset_file_exactly_the_listed_names(tmp_path: Path) -> None:
    src = class_tree(tmp_path / "src", per_class=20)
    source = imagefolder.open_source(src, "train")
    limited = pack(source, tmp_path / "limited", PackOptions(limit=12)).manifest
    assert limited.num_samples == 12
    assert len(set(limited.index()["label"].tolist())) == 3

    wanted = ("ant/003.jpg", "cat/019.jpg", "bee/000.jpg")
    chosen = pack(source, tmp_path / "chosen", PackOptions(subset=wanted)).manifest
    stored = members(chosen)
    assert {json.loads(stored[f"{row:09d}.json"])["name"] for row in range(chosen.num_samples)} == set(wanted)
    assert chosen.classes == ("ant", "bee", "cat")  # labels stay those of the whole


def test_a_subset_matches_file_names_and_refuses_unknown_and_ambiguous_ones(tmp_path: Path) -> None:
    names = ("a/x_1.jpg", "b/y_1.jpg", "b/same.jpg", "a/same.jpg")
    src = plant(tmp_path / "src", {name: jpeg(i) for i, name in enumerate(names)})
    source = imagefolder.open_source(src, "train")
    assert pack(source, tmp_path / "dst", PackOptions(subset=("y_1.jpg",))).manifest.num_samples == 1
    with pytest.raises(ShardError, match=r"1 of 2 names are not in the source, such as 'nope\.jpg'"):
        pack(source, tmp_path / "dst2", PackOptions(subset=("x_1.jpg", "nope.jpg")))
    with pytest.raises(ShardError, match=r"'same\.jpg' is the name of 2 files"):
        pack(source, tmp_path / "dst3", PackOptions(subset=("same.jpg",)))


def test_a_finished_pack_is_left_alone_refused_with_other_options_and_replaced_on_request(tmp_path: Path) -> None:
    src = class_tree(tmp_path / "src")
    source = imagefolder.open_source(src, "train")
    pack(source, tmp_path / "dst", PackOptions(shard_size=5))
    before = hashes(tmp_path / "dst")
    again = pack(source, tmp_path / "dst", PackOptions(shard_size=5, workers=2))
    assert again.progress is None
    assert hashes(tmp_path / "dst") == before
    with pytest.raises(ShardError, match="other files or options"):
        pack(source, tmp_path / "dst", PackOptions(shard_size=6))
    plant(src, {"ant/new.jpg": jpeg(9)})
    with pytest.raises(ShardError, match="other files or options"):
        pack(imagefolder.open_source(src, "train"), tmp_path / "dst", PackOptions(shard_size=5))

    plant(tmp_path / "dst/train", {"notes.txt": b"mine"})
    replaced = pack(source, tmp_path / "dst", PackOptions(shard_size=20, overwrite=True)).manifest
    names = {path.name for path in (tmp_path / "dst/train").iterdir()}
    assert len(replaced.shards) == 2
    assert names == {
        *("train-000000.tar", "train-000000.idx", "train-000001.tar", "train-000001.idx"),
        *("index.npy", "manifest.json", "notes.txt"),
    }


def test_shards_without_a_manifest_are_not_overwritten(tmp_path: Path) -> None:
    src = class_tree(tmp_path / "src")
    plant(tmp_path / "dst/train", {"train-000000.tar": b"someone else's"})
    with pytest.raises(ShardError, match="is there already"):
        pack(imagefolder.open_source(src, "train"), tmp_path / "dst", PackOptions())
    assert (tmp_path / "dst/train/train-000000.tar").read_bytes() == b"someone else's"


def test_every_split_is_in_timms_index(tmp_path: Path) -> None:
    src = tmp_path / "src"
    class_tree(src / "train", per_class=4)
    class_tree(src / "val", per_class=2)
    for split in ("train", "val"):
        pack(imagefolder.open_source(src, split), tmp_path / "dst", PackOptions(shard_size=5))
    info = json.loads((tmp_path / "dst/_info.json").read_bytes())["splits"]
    assert {name: (entry["num_samples"], entry["shard_lengths"]) for name, entry in info.items()} == {
        "train": (12, [5, 5, 2]),
        "val": (6, [5, 1]),
    }
    assert info["val"]["filenames"] == ["val/val-000000.tar", "val/val-000001.tar"]
    assert Manifest.load(tmp_path / "dst", "val").classes == ("ant", "bee", "cat")


def test_palette_and_transparent_images_shrink_to_rgb_jpeg(tmp_path: Path) -> None:
    contents = {
        "p.png": encode(picture(1).convert("P"), "PNG"),
        "rgba.png": encode(picture(2).convert("RGBA"), "PNG"),
        "la.webp": encode(picture(3).convert("RGBA"), "WEBP"),
        "cmyk.jpg": encode(picture(4).convert("CMYK"), "JPEG"),
    }
    manifest = pack(from_memory(contents), tmp_path, PackOptions(resize=Resize(max_side=20))).manifest
    images = [Image.open(io.BytesIO(data)) for data in payloads(manifest)]
    assert {(image.format, image.mode, image.size) for image in images} == {("JPEG", "RGB", (20, 15))}
