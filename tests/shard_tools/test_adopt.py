"""Foreign WebDataset shards are indexed in place, or refused with a sentence where readers would misread them."""

from __future__ import annotations

import io
import json
import random
import tarfile
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from shard_tools.adopt import AdoptOptions, adopt
from shard_tools.extract import extract
from shard_tools.foreign import read_samples
from shard_tools.info import describe
from shard_tools.manifest import Manifest, ShardError
from shard_tools.sources import webdataset as source
from shard_tools.tar import members
from shard_tools.verify import check
from tests.shard_tools.builders import encode, hashes, jpeg, payloads, picture, plant

Member = tuple[str, bytes]


def write_tar(path: Path, members: list[Member | tarfile.TarInfo], form: int = tarfile.GNU_FORMAT) -> Path:
    """A tar by another hand; TarInfos go in as they are, without content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                entry = tarfile.TarInfo(member[0])
                entry.size, entry.mtime, entry.uname = len(member[1]), 1_700_000_000, "someone"
                archive.addfile(entry, io.BytesIO(member[1]))
    return path


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def samples(first: int, count: int, label: bool = True) -> list[Member | tarfile.TarInfo]:
    members: list[Member | tarfile.TarInfo] = []
    for i in range(first, first + count):
        members.append((f"s{i:05d}.jpg", jpeg(i)))
        if label:
            members.append((f"s{i:05d}.cls", b"%d\n" % (i % 3)))
    return members


def test_foreign_shards_are_adopted_without_changing_a_byte_of_them(tmp_path: Path) -> None:
    write_tar(tmp_path / "cc-000.tar", samples(0, 5))
    write_tar(tmp_path / "cc-001.tar", samples(5, 3))
    before = hashes(tmp_path)
    (manifest,) = adopt(tmp_path, AdoptOptions(split="train", workers=2))
    after = hashes(tmp_path)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"cc-000.idx", "cc-001.idx", "index.npy", "manifest.json", "_info.json"}
    assert payloads(manifest) == [jpeg(i) for i in range(8)]
    assert manifest.index()["label"].tolist() == [i % 3 for i in range(8)]
    assert manifest.classes == ("0", "1", "2")
    assert manifest.member_name(6) == "cc-001.tar:s00006.jpg"
    assert Manifest.load(tmp_path) == manifest
    assert check(manifest, full=True) == []


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_odd_member_names_get_true_offsets_in_every_tar_format(tmp_path: Path, form: int) -> None:
    folder = "f" * 90 if form == tarfile.USTAR_FORMAT else "deep" * 40
    names = [f"{folder}/{i:03d}" for i in range(3)] + [
        "with space",
        "d/\u732b" if form != tarfile.USTAR_FORMAT else "plain",
    ]
    write_tar(tmp_path / "x.tar", [(f"{name}.jpg", jpeg(i)) for i, name in enumerate(names)], form)
    (manifest,) = adopt(tmp_path, AdoptOptions())
    assert payloads(manifest) == [jpeg(i) for i in range(len(names))]
    lines = (tmp_path / "x.idx").read_text().splitlines()
    assert lines[0] == "v1.2 5"
    assert all(len(line.split(" ")) == 4 for line in lines[1:])  # DALI's parser breaks on blanks in names


def test_split_folders_become_splits_with_one_timm_index_above(tmp_path: Path) -> None:
    write_tar(tmp_path / "train/a.tar", samples(0, 4))
    write_tar(tmp_path / "val/a.tar", samples(4, 2))
    assert [manifest.split for manifest in adopt(tmp_path, AdoptOptions())] == ["train", "val"]
    info = json.loads((tmp_path / "_info.json").read_bytes())
    assert info["splits"]["val"]["filenames"] == ["val/a.tar"]
    assert Manifest.load(tmp_path, "val").num_samples == 2


def test_labels_come_from_json_where_there_is_no_cls_and_unlabelled_data_has_none(tmp_path: Path) -> None:
    meta = [json.dumps({"label": 1}), json.dumps({"cls": 0}), json.dumps({"label": 2, "caption": "a cat"})]
    members: list[Any] = []
    for i, text in enumerate(meta):
        members += [(f"{i}.jpeg", jpeg(i)), (f"{i}.json", text.encode()), (f"{i}.txt", b"7")]
    write_tar(tmp_path / "json/x.tar", members)
    write_tar(tmp_path / "none/x.tar", samples(0, 3, label=False))
    labelled, unlabelled = adopt(tmp_path, AdoptOptions())
    assert labelled.index()["label"].tolist() == [1, 0, 2]
    assert unlabelled.classes is None


def test_class_names_may_be_given_and_must_suffice(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", samples(0, 3))
    with pytest.raises(ShardError, match="the label 2 has no name among 2 classes"):
        adopt(tmp_path, AdoptOptions(classes=("a", "b")))
    assert adopt(tmp_path, AdoptOptions(classes=("a", "b", "c", "d")))[0].classes == ("a", "b", "c", "d")


def test_what_no_reader_takes_for_a_sample_is_passed_over(tmp_path: Path) -> None:
    extra: list[Any] = [
        special("folder", tarfile.DIRTYPE),
        (".hidden.jpg", b"x"),
        ("README", b"x"),
        ("__index__.json", b"{}"),
    ]
    write_tar(tmp_path / "x.tar", [*extra, *samples(0, 2)])
    assert adopt(tmp_path, AdoptOptions())[0].num_samples == 2


REFUSED: dict[str, tuple[list[Any], str]] = {
    "mis-ordered": ([("a.jpg", jpeg(1)), ("b.jpg", jpeg(2)), ("a.cls", b"1"), ("b.cls", b"1")], "are not together"),
    "duplicate": ([("a.jpg", jpeg(1)), ("a.jpg", jpeg(2))], "is there twice"),
    "duplicate by case": ([("a.jpg", jpeg(1)), ("a.JPG", jpeg(2))], "is there twice"),
    "dot in the key": ([("n.01.jpg", jpeg(1))], "has a dot in its key"),
    "no image": ([("a.cls", b"1")], "has no image"),
    "two images": ([("a.jpg", jpeg(1)), ("a.png", jpeg(1))], r"has 2 images \(jpg, png\)"),
    "binary label": ([("a.jpg", jpeg(1)), ("a.cls", (7).to_bytes(8, "little"))], "not a class number"),
    "negative label": ([("a.jpg", jpeg(1)), ("a.cls", b"-1")], "not a class number"),
    "huge label": ([("a.jpg", jpeg(1)), ("a.cls", b"9" * 5000)], "not a class number"),
    "broken json": ([("a.jpg", jpeg(1)), ("a.json", b"{")], "is not valid JSON"),
    "deep json": ([("a.jpg", jpeg(1)), ("a.json", b"[" * 200_000)], "is not valid JSON"),
    "huge json": ([("a.jpg", jpeg(1)), ("a.json", b"[" + b" " * 2**20 + b"]")], "more than 1048576 bytes"),
    "some without label": ([("a.jpg", jpeg(1)), ("a.cls", b"1"), ("b.jpg", jpeg(2))], "some samples have a label"),
    "climbing path": ([("../../evil.jpg", jpeg(1))], "points out of its folder"),
    "absolute path": ([("/etc/evil.jpg", jpeg(1))], "points out of its folder"),
    "symbolic link": ([special("a.jpg", tarfile.SYMTYPE, "/etc/passwd")], "is a symbolic link, not a regular file"),
    "hard link": ([("a.jpg", jpeg(1)), special("b.jpg", tarfile.LNKTYPE, "a.jpg")], "is a hard link"),
    "device": ([special("a.jpg", tarfile.CHRTYPE)], "is a device"),
    "pipe": ([special("a.jpg", tarfile.FIFOTYPE)], "is a pipe"),
    "empty image": ([("a.jpg", b"")], "has 0 bytes"),
    "bad image": ([("a.jpg", b"text")], r"x\.tar:a\.jpg is no good image"),
    "nothing": ([], "holds no samples"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_shard_that_readers_would_misread_is_refused_and_nothing_is_written(tmp_path: Path, fault: str) -> None:
    members, message = REFUSED[fault]
    write_tar(tmp_path / "x.tar", members)
    before = hashes(tmp_path)
    with pytest.raises(ShardError, match=message):
        adopt(tmp_path, AdoptOptions())
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("fault", [f for f in REFUSED if f not in ("bad image", "empty image", "nothing")])
def test_repacking_refuses_what_adopting_refuses(tmp_path: Path, fault: str) -> None:
    members, message = REFUSED[fault]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(ShardError, match=message):
        source.open_source(str(tmp_path), "train")


def header_with_size(size: bytes) -> bytes:
    """A USTAR header whose size field says what no writer would."""
    block = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)[:512])
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"this is no tar" * 100,
        header_with_size(b"77777777777\0") + bytes(2048),
        header_with_size(b"\xff" * 8 + (-1024 & 0xFFFFFFFF).to_bytes(4, "big")) + bytes(2048),
        header_with_size(b"\x80" + (10**15).to_bytes(11, "big")) + bytes(2048),
        b"\x1f\x8b\x08\0" + bytes(100),
    ],
    ids=["empty", "text", "huge", "negative", "petabyte", "gzip"],
)
def test_damaged_and_hostile_tars_are_refused_at_once(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"x\.tar"):
        adopt(tmp_path, AdoptOptions())


@pytest.mark.parametrize("size", [-512, -1024, -1536, -(10**9)])
def test_a_pax_size_that_leads_backwards_ends_instead_of_looping(tmp_path: Path, size: int) -> None:
    entry = tarfile.TarInfo("a.jpg")
    entry.pax_headers = {"size": str(size)}  # -1536 leads from the payload back to the first header
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(entry)
    with pytest.raises(ShardError, match=r"x\.tar"):
        list(islice(members(tmp_path / "x.tar"), 100))


def test_a_thousand_mutated_tars_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    rng = random.Random(7)
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for i in range(3):
            plant(tmp_path / "in", {f"{i}.jpg": encode(picture(i, (8, 8)))})
            archive.add(tmp_path / f"in/{i}.jpg", f"{'long' * 30}/{i}.jpg")
    refusals = []
    good = path.read_bytes().rstrip(b"\0") + bytes(1024)
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 5)):
            at = rng.randrange(len(data))
            data[at] = rng.choice((rng.randrange(256), ord("7"), 0, 0x80, 0xFF))
            block = at // 512 * 512
            if rng.random() < 0.7 and data[block + 257 : block + 262] == b"ustar":  # a header that checks out again
                data[block + 148 : block + 156] = b" " * 8
                data[block + 148 : block + 156] = b"%06o\0 " % sum(data[block : block + 512])
        path.write_bytes(data)
        try:
            read_samples(path)
        except ShardError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert not any("\n" in refusal for refusal in refusals)


def test_a_tar_cut_inside_a_member_is_refused_and_one_without_end_blocks_accepted(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", samples(0, 3))
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        end = max(e.offset_data + e.size + -e.size % 512 for e in archive)
    for cut in (1, 511, 512, 600, 1500):
        path.write_bytes(data[: end - cut])
        with pytest.raises(ShardError, match=r"x\.tar"):
            adopt(tmp_path, AdoptOptions())
    path.write_bytes(data[:end])
    assert adopt(tmp_path, AdoptOptions())[0].num_samples == 3


def test_quarantine_leaves_bad_images_out_of_the_index_only(tmp_path: Path) -> None:
    members = [*samples(0, 2), ("bad.jpg", b"text"), ("bad.cls", b"0"), *samples(2, 2)]
    write_tar(tmp_path / "x.tar", members)
    (manifest,) = adopt(tmp_path, AdoptOptions(on_bad="quarantine"))
    assert payloads(manifest) == [jpeg(i) for i in range(4)]
    assert [bad["name"] for bad in manifest.census["bad"]] == ["x.tar:bad.jpg"]
    assert check(manifest, full=True) == []


def test_an_index_or_manifest_in_the_way_is_replaced_only_on_request(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", samples(0, 2))
    plant(tmp_path, {"x.idx": b"mine"})
    with pytest.raises(ShardError, match=r"x\.idx is there already"):
        adopt(tmp_path, AdoptOptions())
    adopt(tmp_path, AdoptOptions(overwrite=True))
    with pytest.raises(ShardError, match="has a manifest already"):
        adopt(tmp_path, AdoptOptions())
    adopt(tmp_path, AdoptOptions(overwrite=True))


def test_compressed_shards_and_empty_folders_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"holds no \.tar files; give a folder"):
        adopt(tmp_path, AdoptOptions())
    plant(tmp_path, {"x.tar.gz": b""})
    with pytest.raises(ShardError, match=r"unpack x\.tar\.gz"):
        adopt(tmp_path, AdoptOptions())


def test_shards_of_the_webdataset_package_are_adopted_and_packed_again(tmp_path: Path) -> None:
    images = [np.asarray(picture(i)) for i in range(6)]
    with webdataset.ShardWriter(str(tmp_path / "w-%03d.tar"), maxcount=4, verbose=0) as writer:
        for i, image in enumerate(images):
            writer.write({"__key__": f"k{i}", "jpg": image, "cls": i % 2, "json": {"caption": "x"}})
    (manifest,) = adopt(tmp_path, AdoptOptions())
    assert describe(manifest)["num_samples"] == 6
    assert manifest.index()["label"].tolist() == [0, 1, 0, 1, 0, 1]
    assert check(manifest, full=True) == []


def test_extracting_hostile_names_stays_inside_the_folder(tmp_path: Path) -> None:
    hostile = ["../../escape.jpg", "/etc/passwd", "a/b/../../c.jpg", "-rf.jpg", "x\ny.jpg", ".", "", "n" * 300 + ".jpg"]
    members: list[Any] = []
    for i, name in enumerate(hostile):
        members += [(f"{i}.png", encode(picture(i), "PNG")), (f"{i}.json", json.dumps({"name": name}).encode())]
    write_tar(tmp_path / "in/x.tar", members)
    (manifest,) = adopt(tmp_path / "in", AdoptOptions())
    out = tmp_path / "out"
    paths = extract(manifest, range(len(hostile)), out)
    assert all(path.parent == out and path.name.isascii() and len(path.name) < 120 for path in paths)
    assert [path.read_bytes() for path in paths] == payloads(manifest)
    assert paths[0].name == "000000000_escape.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    with pytest.raises(ShardError, match="is there already"):
        extract(manifest, [0], out)


def test_extract_writes_through_no_link_and_checks_what_it_reads(tmp_path: Path) -> None:
    write_tar(tmp_path / "in/x.tar", samples(0, 2))
    (manifest,) = adopt(tmp_path / "in", AdoptOptions())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/000000000.jpg").symlink_to(tmp_path / "target")
    with pytest.raises(ShardError, match="is there already"):
        extract(manifest, [0], tmp_path / "out")
    assert not (tmp_path / "target").exists()
    data = bytearray((tmp_path / "in/x.tar").read_bytes())
    data[int(manifest.index()[1]["offset"]) + 200] ^= 1
    (tmp_path / "in/x.tar").write_bytes(data)
    with pytest.raises(ShardError, match=r"x\.tar:s00001\.jpg is damaged"):
        extract(manifest, [1], tmp_path / "out")
    with pytest.raises(ShardError, match="there is no sample 2"):
        extract(manifest, [2], tmp_path / "out")
