"""PASCAL VOC: what the lists and annotations say arrives in labels.npy and in each sample's .json, and is verified."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shard_tools.foreign import read_samples
from shard_tools.info import describe
from shard_tools.manifest import Manifest, ShardError
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import voc07
from shard_tools.verify import check
from tests.shard_tools.builders import ROOT, hashes, jpeg, plant, shell
from tests.shard_tools.test_interrupted import CHILD
from tests.voc import annotation, devkit

DOG, CAT = voc07.CLASSES.index("dog"), voc07.CLASSES.index("cat")


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """train: 6 images, val: 3, trainval: all 9, test: 4."""
    return devkit(tmp_path / "VOC2007")


def packed(src: Path, dst: Path, split: str = "trainval", **options: object) -> Manifest:
    return pack(voc07.open_source(src, split), dst, PackOptions(shard_size=4, **options)).manifest


def samples(manifest: Manifest) -> list[dict]:
    paths = [manifest.shard_path(number) for number in range(len(manifest.shards))]
    return [sample.meta for path in paths for sample in read_samples(path)]


def test_the_command_packs_every_list_that_is_there_and_verifies_it(src: Path, tmp_path: Path) -> None:
    done = shell("pack", "voc07", src, tmp_path / "dst", "--shard-size", 4)
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "images in" in line] == [*voc07.SPLITS]
    shell("verify", tmp_path / "dst", "--full")
    assert Manifest.load(tmp_path / "dst", "trainval").num_samples == 9


def test_labels_are_those_of_the_annotations_in_the_order_of_the_rows(src: Path, tmp_path: Path) -> None:
    manifest = packed(src, tmp_path / "dst")
    labels = manifest.labels()
    assert (labels.dtype, labels.shape) == (np.int8, (9, 20))
    assert set(manifest.index()["label"].tolist()) == {-1}
    for row, meta in zip(labels, samples(manifest), strict=True):
        expected = np.zeros(20)
        text = (src / "Annotations" / meta["name"].replace(".jpg", ".xml")).read_text()
        for block in text.split("<object>")[1:]:
            name = block.partition("<name>")[2].partition("<")[0]
            number = voc07.CLASSES.index(name)
            if "<difficult>0" in block:
                expected[number] = 1
            elif expected[number] == 0:
                expected[number] = -1
        assert row.tolist() == expected.tolist()
    assert {-1, 0, 1} == set(labels.ravel().tolist())


def test_difficult_objects_only_make_a_class_neither_present_nor_absent() -> None:
    def labels(*objects: tuple[str, bool]) -> tuple[int, ...]:
        return voc07.labels_of({"objects": [{"class": name, "difficult": hard} for name, hard in objects]})

    assert labels(("dog", True))[DOG] == -1
    assert labels(("dog", True), ("dog", False))[DOG] == 1
    assert labels(("dog", False), ("dog", True))[DOG] == 1
    assert labels(("dog", True), ("cat", False))[CAT] == 1
    assert sum(map(abs, labels())) == 0


def test_the_json_of_a_sample_has_boxes_and_flags_as_annotated(src: Path, tmp_path: Path) -> None:
    objects = [("dog", (8, 12, 30.5, 20), True, False), ("cat", (1, 1, 40, 30), False, True)]
    (src / "Annotations/000001.xml").write_text(annotation((40, 30), objects))
    meta = next(meta for meta in samples(packed(src, tmp_path / "dst")) if meta["name"] == "000001.jpg")
    assert meta["labels"] == {"cat": 1, "dog": -1}
    assert meta["annotation"] == {
        "size": [40, 30],
        "objects": [
            {"class": "dog", "box": [8, 12, 30.5, 20], "difficult": True, "truncated": False},
            {"class": "cat", "box": [1, 1, 40, 30], "difficult": False, "truncated": True},
        ],
    }


def test_the_same_source_packs_to_the_same_bytes_and_another_label_to_another_pack(src: Path, tmp_path: Path) -> None:
    first, again = packed(src, tmp_path / "a"), packed(src, tmp_path / "b", workers=2)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert packed(src, tmp_path / "a").digest == first.digest == again.digest
    (src / "Annotations/000001.xml").write_text(annotation((40, 30), [("sofa", (1, 1, 9, 9), False, False)]))
    with pytest.raises(ShardError, match="other files or options"):
        packed(src, tmp_path / "a")
    assert packed(src, tmp_path / "a", overwrite=True).digest != first.digest


def test_rows_of_labels_stay_with_their_images_where_others_are_quarantined(src: Path, tmp_path: Path) -> None:
    (src / "JPEGImages/000003.jpg").write_bytes(b"no image")
    (src / "JPEGImages/000005.jpg").unlink()
    manifest = packed(src, tmp_path / "dst", on_bad="quarantine")
    assert manifest.num_samples == len(manifest.labels()) == 7
    assert check(manifest, full=True) == []


@pytest.mark.parametrize("limit", [0, 5])
def test_a_limit_cuts_images_and_labels_alike(src: Path, tmp_path: Path, limit: int) -> None:
    manifest = packed(src, tmp_path / "dst", limit=limit)
    assert manifest.labels().shape == (limit or 9, 20)
    assert check(manifest, full=True) == []


# of the calls of os.replace, 9 puts labels.npy in its place, behind three shards with their .idx and index.npy
@pytest.mark.parametrize(("number", "when"), [(8, "before"), (9, "before"), (9, "after"), (10, "before")])
def test_kill_9_around_the_labels_and_a_rerun_give_the_bytes_of_an_uninterrupted_pack(
    src: Path, tmp_path: Path, number: int, when: str
) -> None:
    packed(src, tmp_path / "whole")
    arguments = ["pack", "voc07", str(src), str(tmp_path / "dst"), "--split", "trainval", "--shard-size", "4"]
    command = [sys.executable, "-c", CHILD, "SIGKILL", "os.replace", str(number), when, *arguments]
    killed = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "dst/trainval/manifest.json").exists()
    assert (tmp_path / "dst/trainval/labels.npy").exists() == ((number, when) in ((9, "after"), (10, "before")))
    shell(*arguments)
    assert hashes(tmp_path / "dst") == hashes(tmp_path / "whole")


def test_verify_sees_labels_that_are_missing_damaged_or_of_another_pack(src: Path, tmp_path: Path) -> None:
    manifest = packed(src, tmp_path / "dst")
    path = manifest.root / "labels.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert any("its sha256 differs" in fault for fault in check(manifest))
    path.write_bytes(good[:-1])
    assert any("does not hold 9 rows" in fault for fault in check(manifest))
    path.unlink()
    assert any("labels.npy cannot be read" in fault for fault in check(manifest))


def test_full_verify_holds_labels_to_what_the_shards_say(src: Path, tmp_path: Path) -> None:
    import hashlib
    from dataclasses import replace

    manifest = packed(src, tmp_path / "dst")
    path = manifest.root / "labels.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # tvmonitor of the last row
    path.write_bytes(content)
    forged = replace(manifest, labels_sha256=hashlib.sha256(content).hexdigest())
    (manifest.root / "manifest.json").write_bytes(forged.to_bytes())
    reloaded = Manifest.load(tmp_path / "dst", "trainval")
    assert check(reloaded) == []
    (fault,) = check(reloaded, full=True)
    assert "other labels in its metadata than in labels.npy" in fault


def test_a_split_of_several_labels_does_not_pass_for_one_of_single_labels(src: Path, tmp_path: Path) -> None:
    manifest = packed(src, tmp_path / "dst")
    assert manifest.multi_label
    assert not manifest.labelled
    counts = (manifest.labels() == 1).sum(0)
    assert describe(manifest)["samples_per_class"] == [counts.min(), counts.max()]


def test_a_manifest_without_labels_is_as_it_was(tmp_path: Path) -> None:
    from shard_tools.sources import files

    plant(tmp_path / "src", {f"{i}.jpg": jpeg(i) for i in range(3)})
    manifest = pack(files.open_source(tmp_path / "src", "train"), tmp_path / "dst", PackOptions()).manifest
    assert "labels_sha256" not in json.loads((manifest.root / "manifest.json").read_text())
    with pytest.raises(ShardError, match=r"no labels\.npy"):
        manifest.labels()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>', "declares a document type"),
        ("<!DOCTYPE annotation><annotation/>", "declares a document type"),
        ("<annotation>", "no element found|unclosed"),
        ("<annotation/>", "its width is ''"),
        ("", "no element found"),
        ('<?xml version="1.0" encoding="no-such"?><a/>', "encoding"),
        (annotation((40, 30), [("zebra", (1, 1, 2, 2), False, False)]), "'zebra' is none of VOC's"),
        (annotation((40, 30), [("dog", (9, 1, 2, 2), False, False)]), "is empty"),
        (annotation((40, 30), [("dog", ("nan", 1, 2, 2), False, False)]), "its xmin is 'nan'"),
        (annotation((40, 30), [("dog", (1, 1, 2, 2), False, False)]).replace("<difficult>0", "<difficult>x"), "'x'"),
        ("<annotation>" + " " * 2**20 + "</annotation>", "larger than"),
    ],
)
def test_a_bad_or_hostile_annotation_is_refused_in_one_sentence(src: Path, text: str, message: str) -> None:
    (src / "Annotations/000001.xml").write_text(text)
    with pytest.raises(ShardError, match=message) as caught:
        voc07.open_source(src, "train")
    assert "000001.xml" in str(caught.value)


def test_a_document_type_is_seen_in_every_encoding(src: Path) -> None:
    text = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'
    (src / "Annotations/000001.xml").write_bytes(text.encode("utf-16"))
    with pytest.raises(ShardError, match="declares a document type"):
        voc07.open_source(src, "train")


@pytest.mark.parametrize(
    ("listed", "message"),
    [("../../etc/passwd", "no name of an image"), ("000001\n000001", "an image twice"), ("000099", "cannot be read")],
)
def test_a_list_that_names_no_images_of_the_devkit_is_refused(src: Path, listed: str, message: str) -> None:
    (src / "ImageSets/Main/train.txt").write_text(listed)
    with pytest.raises(ShardError, match=message):
        voc07.open_source(src, "train")


def test_another_folder_than_the_devkit_is_refused_with_the_folder_that_it_should_be(tmp_path: Path) -> None:
    tests_folder = Path(__file__).parent
    assert "VOCdevkit/VOC2007" in shell("pack", "voc07", tests_folder, tmp_path, code=2).stderr
