"""A manifest is believed only as far as it was checked: damaged, foreign and hostile ones are refused."""

from __future__ import annotations

import json
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shard_tools.info import describe, lines
from shard_tools.manifest import INDEX_DTYPE, Damaged, Manifest, ShardError
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import imagefolder
from tests.shard_tools.builders import ROOT, class_tree


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """21 labelled samples in 5 shards."""
    src = class_tree(tmp_path / "src")
    pack(imagefolder.open_source(src, "train"), tmp_path / "dst", PackOptions(shard_size=5))
    return tmp_path / "dst"


def rewrite(packed: Path, **changes: Any) -> None:
    path = packed / "train/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


def test_the_manifest_of_a_data_set_is_found_from_above_and_from_its_folder(packed: Path) -> None:
    above, inside = Manifest.load(packed), Manifest.load(packed / "train", "train")
    assert above == inside
    assert above.split == "train"
    assert above.labelled
    assert above.num_samples == 21
    assert above.index().dtype == INDEX_DTYPE
    assert above.shard_path(4) == packed / "train/train-000004.tar"
    assert above.member_name(20) == "train-000004.tar:000000020.jpg"


def test_what_is_not_there_is_named_with_what_is(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="has no split 'test', only train"):
        Manifest.load(packed, "test")
    with pytest.raises(ShardError, match="no such folder of shards"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(ShardError, match=r"no manifest\.json in .*shard_tools index"):
        Manifest.load(tmp_path / "src")


def test_a_split_folder_does_not_pass_for_another_split(packed: Path) -> None:
    with pytest.raises(ShardError, match="holds the split 'train', not 'test'"):
        Manifest.load(packed / "train", "test")


def test_the_digest_follows_the_data_and_not_the_place(packed: Path, tmp_path: Path) -> None:
    src = tmp_path / "src"
    same = pack(imagefolder.open_source(src, "train"), tmp_path / "again", PackOptions(shard_size=5)).manifest
    other = pack(imagefolder.open_source(src, "train"), tmp_path / "other", PackOptions(shard_size=5, seed=1)).manifest
    assert Manifest.load(packed).digest == same.digest != other.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "other"},
        {"version": 2},
        {"num_samples": 20},
        {"num_samples": True},
        {"num_samples": -1},
        {"shards": {}},
        {"shards": [1]},
        {"classes": "abc"},
        {"classes": [1, 2]},
        {"census": []},
        {"census": {"formats": []}},
        {"census": {"corrupt_exif": "x"}},
        {"census": {"quantiles": {"width": 3}}},
        {"census": {"oddities": [1]}},
        {"census": {"bad": [{"name": "x"}]}},
        {"census": {"bad": [{"name": "x", "reason": "y", "action": "kept", "row": []}]}},
        {"split": "../train"},
        {"digest": None},
        {"index_sha256": 5},
    ],
)
def test_a_manifest_with_a_wrong_field_is_refused(packed: Path, changes: dict[str, Any]) -> None:
    rewrite(packed, **changes)
    with pytest.raises(ShardError, match=r"is no manifest of .+ \(.+\); .*pack the split again"):
        Manifest.load(packed)


def test_a_change_of_what_the_digest_leaves_out_is_refused_too(packed: Path) -> None:
    """The census, the source and the hashes of .idx files: training reads some of them."""
    path = packed / "train/manifest.json"
    good = path.read_text()
    for before, after in (('"jpeg": 21', '"jpeg": 29'), ('"kind": "imagefolder"', '"kind": "imagefoldes"')):
        assert before in good
        path.write_text(good.replace(before, after))
        with pytest.raises(Damaged, match="its checksum does not match"):
            Manifest.load(packed)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.tar", "a/b.tar", ".hidden.tar", "x.txt", "nul\0.tar", ""])
def test_a_shard_name_that_could_leave_the_folder_is_refused(packed: Path, name: str) -> None:
    document = json.loads((packed / "train/manifest.json").read_bytes())
    document["shards"][0]["name"] = name
    rewrite(packed, shards=document["shards"])
    with pytest.raises(ShardError, match="is no manifest of version 1"):
        Manifest.load(packed)


def test_an_edited_manifest_is_refused(packed: Path) -> None:
    rewrite(packed, classes=["ant", "bee", "dog"])
    with pytest.raises(ShardError, match="was changed after packing"):
        Manifest.load(packed)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"null", b"3"])
def test_bytes_that_are_no_manifest_are_refused(packed: Path, content: bytes) -> None:
    (packed / "train/manifest.json").write_bytes(content)
    with pytest.raises(ShardError, match=r"is not valid JSON|is no manifest"):
        Manifest.load(packed)


def test_a_manifest_that_nobody_could_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = class_tree(tmp_path / "src")
    monkeypatch.setattr("shard_tools.manifest.MAX_MANIFEST_BYTES", 2000)
    with pytest.raises(ShardError, match="more than 2000, for its 5 shards and 0 bad files; pack larger shards"):
        pack(imagefolder.open_source(src, "train"), tmp_path / "dst", PackOptions(shard_size=5))
    assert not (tmp_path / "dst/train/manifest.json").exists()
    monkeypatch.undo()
    pack(imagefolder.open_source(src, "train"), tmp_path / "dst", PackOptions(shard_size=25, overwrite=True))
    assert Manifest.load(tmp_path / "dst").num_samples == 21


def test_five_hundred_mutated_manifests_are_described_or_refused_and_nothing_else(packed: Path) -> None:
    path = packed / "train/manifest.json"
    good = path.read_text()
    values = re.findall(r'(?<=: )(?:"[^"]*"|\d+|\[|\{|null)', good)
    rng = random.Random(2)
    refusals = 0
    for _ in range(500):
        text = good
        for _ in range(rng.randint(1, 2)):
            value = rng.choice(values)
            other = rng.choice(["null", "-1", "1e999", '"x"', "[]", "{}", "true", str(10**30), '"\\ud800"', "[[["])
            text = text.replace(f": {value}", f": {other}", rng.randint(1, 3))
        path.write_text(text)
        try:
            manifest = Manifest.load(packed)
            manifest.check_quick()
            "\n".join(lines(describe(manifest)))
        except ShardError:
            refusals += 1
    assert refusals > 250


def test_a_huge_manifest_is_not_read(packed: Path) -> None:
    with (packed / "train/manifest.json").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ShardError, match="larger than 67108864 bytes"):
        Manifest.load(packed)


def test_all_missing_shards_are_listed_at_once(packed: Path) -> None:
    for number in (0, 2, 4):
        (packed / f"train/train-00000{number}.tar").unlink()
    faults = Manifest.load(packed).check_quick()
    assert [fault.rpartition("/")[2] for fault in faults] == [f"train-00000{n}.tar is missing" for n in (0, 2, 4)]


def test_a_shard_of_another_size_is_named_with_both_sizes(packed: Path) -> None:
    path = packed / "train/train-000001.tar"
    size = path.stat().st_size
    for cut in range(0, size, 512):  # every one of them a member's edge, or inside a member
        with path.open("r+b") as file:
            file.truncate(cut)
        assert Manifest.load(packed).check_quick() == [f"{path} has {cut} bytes, but its manifest says {size}"]


FIELD_FAULTS = {
    "shard": [9, 2**32 - 1],
    "offset": [0, 2**63, 2**64 - 1, 10**9],
    "size": [0, 10**12, 2**64 - 1],
    "label": [-2, 3, 2**31 - 1],
    "width": [0, 2**32 - 1],
    "height": [0, 2**32 - 1],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in FIELD_FAULTS.items() for v in values])
def test_an_index_out_of_range_is_found_by_its_ranges_and_not_only_by_its_hash(
    packed: Path, field: str, value: int
) -> None:
    rows = np.array(Manifest.load(packed).index())
    rows[7][field] = value
    np.save(packed / "train/index.npy", rows)
    faults = Manifest.load(packed).check_quick()
    assert any("sha256 differs" in fault for fault in faults)
    assert len(faults) >= 2


def test_a_thousand_mutated_indexes_give_faults_and_never_an_exception(packed: Path) -> None:
    path = packed / "train/index.npy"
    good = path.read_bytes()
    manifest = Manifest.load(packed)
    rng = random.Random(1)
    for _ in range(1000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)) :]
        if bytes(data) != good:
            path.write_bytes(data)
            assert manifest.check_quick()


def test_an_index_with_pickled_objects_is_not_unpickled(packed: Path, tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "canary"), "w")

    array = np.empty(21, object)
    array[:] = Canary()
    with (packed / "train/index.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (21,)})
        pickle.dump(array, file)
    manifest = Manifest.load(packed)
    with pytest.raises(ShardError, match="is no index of 21 rows"):
        manifest.index()
    assert not (tmp_path / "canary").exists()


def test_an_index_of_another_shape_or_none_at_all_is_a_sentence(packed: Path) -> None:
    path = packed / "train/index.npy"
    np.save(path, np.zeros(20, INDEX_DTYPE))
    with pytest.raises(ShardError, match="is no index of 21 rows"):
        Manifest.load(packed).index()
    path.unlink()
    assert "cannot be read (No such file" in Manifest.load(packed).check_quick()[0]


def test_the_name_of_a_member_is_given_even_when_its_shard_is_gone_or_damaged(packed: Path) -> None:
    manifest = Manifest.load(packed)
    (packed / "train/train-000001.tar").write_bytes(b"short")
    (packed / "train/train-000002.tar").unlink()
    assert manifest.member_name(5) == "train-000001.tar:000000005"
    assert manifest.member_name(12) == "train-000002.tar:000000012"


def test_a_local_manifest_needs_nothing_but_numpy(packed: Path) -> None:
    code = (
        "import sys; from shard_tools.manifest import Manifest; Manifest.load(sys.argv[1]).check_quick();"
        "others = ('PIL', 'torch', 'rich', 'nvidia', 'fsspec', 'asyncio', 'shard_tools.remote');"
        "sys.exit(any(name in sys.modules for name in others))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(packed)], cwd=ROOT).returncode == 0
