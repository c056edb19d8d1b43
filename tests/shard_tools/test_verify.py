"""Whatever happens to packed files, verify finds it: quick what sizes and indexes show, full every bit."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shard_tools import index, tar
from shard_tools.foreign import read_samples
from shard_tools.manifest import Manifest, ShardError, sha256_of
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import files, imagefolder
from shard_tools.stream import NotPlain, ShardStream
from shard_tools.verify import check, check_info, manifests_below
from tests.faults.mutations import mutated_tar
from tests.faults.record import times
from tests.shard_tools.builders import class_tree, jpeg, plant, sign_again
from tests.shards import write_split


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 labelled samples of equal size in 5 shards."""
    root = tmp_path_factory.mktemp("good")
    contents = {
        f"{name}/{i}.jpg": jpeg(i + 10 * j).ljust(1500, b"\0") for j, name in enumerate("abc") for i in range(7)
    }
    src = plant(root / "src", contents)
    pack(imagefolder.open_source(src, "train"), root / "dst", PackOptions(shard_size=5))
    return root / "dst"


@pytest.fixture
def dst(good: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "dst"))


def faults(dst: Path, full: bool = False) -> list[str]:
    return check(Manifest.load(dst), full=full)


def test_an_untouched_pack_is_good(good: Path) -> None:
    assert faults(good) == faults(good, full=True) == check_info(good, manifests_below(good)) == []


def test_two_workers_find_what_one_finds(dst: Path) -> None:
    data = bytearray((dst / "train/train-000002.tar").read_bytes())
    data[700] ^= 1
    (dst / "train/train-000002.tar").write_bytes(data)
    manifest = Manifest.load(dst)
    assert check(manifest, full=True, workers=2) == check(manifest, full=True, workers=1) != []


def test_quick_finds_a_shard_cut_at_any_block(dst: Path) -> None:
    path = dst / "train/train-000000.tar"
    data = path.read_bytes()
    for cut in range(0, len(data), 512):
        path.write_bytes(data[:cut])
        assert any("bytes, but its manifest says" in fault for fault in faults(dst)), cut


def test_quick_finds_missing_extra_and_unfinished_files(dst: Path) -> None:
    folder = dst / "train"
    (folder / "train-000001.tar").unlink()
    (folder / "train-000002.idx").unlink()
    plant(folder, {"train-000009.tar": b"extra", "train-000003.tar.partial": b"half", "pack.journal": b"{}"})
    names = {Path(fault.split()[0]).name for fault in faults(dst)}
    assert names == {
        *("train-000001.tar", "train-000002.idx"),
        *("train-000009.tar", "train-000003.tar.partial", "pack.journal"),
    }


def test_full_finds_any_flipped_bit(dst: Path) -> None:
    path = dst / "train/train-000001.tar"
    data = path.read_bytes()
    bits = random.Random(3).sample(range(8 * len(data)), 100)
    missed = []
    for bit in bits:
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if not any("sha256 differs" in fault for fault in faults(dst, full=True)):
            missed.append(bit)
    assert missed == []
    path.write_bytes(data)
    assert faults(dst, full=True) == []


def test_full_names_the_image_that_is_damaged(dst: Path) -> None:
    manifest = Manifest.load(dst)
    row = manifest.index()[7]
    path = manifest.shard_path(int(row["shard"]))
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) + 300] ^= 4
    path.write_bytes(data)
    assert f"{path.name}:000000007.jpg is damaged (its crc32 differs)" in faults(dst, full=True)


def test_swapped_shards_of_equal_size_are_found_by_full_and_swapped_indexes_by_quick(dst: Path) -> None:
    a, b = dst / "train/train-000000.tar", dst / "train/train-000001.tar"
    assert a.stat().st_size == b.stat().st_size
    swap(a, b)
    assert faults(dst) == []  # nothing that sizes could show
    assert sum("sha256 differs" in fault for fault in faults(dst, full=True)) == 2
    swap(a, b)
    swap(a.with_suffix(".idx"), b.with_suffix(".idx"))
    assert [fault.rpartition("/")[2] for fault in faults(dst)] == [
        "train-000000.idx is not the index of train-000000.tar (its sha256 differs)",
        "train-000001.idx is not the index of train-000001.tar (its sha256 differs)",
    ]


def swap(a: Path, b: Path) -> None:
    ours, theirs = a.read_bytes(), b.read_bytes()
    a.write_bytes(theirs)
    b.write_bytes(ours)


IDX_FAULTS = {
    "fewer lines": lambda text: "v1.2 3\n" + "\n".join(text.split("\n")[1:4]) + "\n",
    "small count": lambda text: text.replace("v1.2 5", "v1.2 3"),
    "swapped labels": lambda text: text.replace("000000000.cls", "\0").replace("000000001.cls", "000000000.cls"),
    "wrong offset": lambda text: text.replace(" 512 ", " 1024 ", 1),
    "beyond the end": lambda text: text.replace(" 512 ", " 999999999 ", 1),
    "negative": lambda text: text.replace(" 512 ", " -512 ", 1),
    "huge size": lambda text: text.replace(" 1500 ", " 1000000000000 ", 1),
    "v1.0": lambda text: text.replace("v1.2", "v1.0"),
    "empty": lambda text: "",
    "carriage returns": lambda text: text.replace("\n", "\r\n"),
    "another name": lambda text: text.replace("jpg", "png"),
}


@pytest.mark.parametrize("fault", IDX_FAULTS)
def test_every_change_of_an_idx_file_is_found_also_when_it_was_signed(dst: Path, fault: str) -> None:
    path = dst / "train/train-000000.idx"
    path.write_text(IDX_FAULTS[fault](path.read_text()), newline="")
    assert any("is not the index of" in found for found in faults(dst))
    sign_again(dst)
    assert faults(dst) == []
    assert faults(dst, full=True) == [f"{path} does not describe train-000000.tar"]


def test_an_index_row_that_lies_about_its_image_is_found_although_signed(dst: Path) -> None:
    for field, value in (("label", 2), ("offset", 1024), ("crc32", 5), ("width", 41), ("size", 1400)):
        shutil.copytree(dst, dst.with_name(field))
        copy = dst.with_name(field)
        rows = np.array(Manifest.load(copy).index())
        rows[0][field] = value if rows[0][field] != value else 1
        (copy / "train/index.npy").write_bytes(index.npy_bytes(rows))
        sign_again(copy)
        assert any("000000000.jpg" in fault for fault in faults(copy, full=True)), field


def replace_first_shard(dst: Path, members: list[tuple[str, bytes]]) -> None:
    data = b"".join(tar.member(name, payload) for name, payload in members) + tar.END
    (dst / "train/train-000000.tar").write_bytes(data)
    sign_again(dst)


def test_full_rejects_members_that_are_not_ours_although_signed(dst: Path) -> None:
    meta = json.dumps({"name": "x", "width": 40, "height": 30}).encode()
    sample = [("000000000.jpg", jpeg(1)), ("000000000.cls", b"0"), ("000000000.json", meta)]
    replace_first_shard(dst, [*sample, *sample])
    assert any("is there twice" in fault for fault in faults(dst, full=True))
    replace_first_shard(dst, [*sample, ("000000001.jpg", jpeg(1)), ("000000000.txt", b"again")])
    assert any("are not together" in fault for fault in faults(dst, full=True))
    replace_first_shard(dst, sample)
    assert any("holds 1 samples, but its index 5" in fault for fault in faults(dst, full=True))


def test_missing_end_blocks_are_accepted_when_signed_and_garbage_behind_the_end_too(dst: Path) -> None:
    path = dst / "train/train-000000.tar"
    data = path.read_bytes()
    path.write_bytes(data[:-1024])
    sign_again(dst)
    assert faults(dst, full=True) == []
    path.write_bytes(data + b"garbage")
    assert any("bytes, but its manifest says" in fault for fault in faults(dst))


def test_a_damaged_header_does_not_pass_for_the_end_of_the_tar(dst: Path) -> None:
    path = dst / "train/train-000000.tar"
    data = bytearray(path.read_bytes())
    third = data.index(b"000000001.jpg")
    data[third + 148 : third + 156] = b"badcheck"
    path.write_bytes(data)
    sign_again(dst)
    assert any(f"has a damaged header at byte {third}" in fault for fault in faults(dst, full=True))


def test_images_that_were_kept_although_bad_are_not_faults(tmp_path: Path) -> None:
    src = plant(tmp_path / "src", {"a.jpg": jpeg(1), "cut.jpg": jpeg(2)[:-200], "text.jpg": b"text"})
    pack(files.open_source(src, "train"), tmp_path / "dst", PackOptions(on_bad="keep"))
    assert faults(tmp_path / "dst", full=True) == []


def test_timms_index_must_list_every_split_as_it_is(dst: Path) -> None:
    (dst / "_info.json").write_text("{}")
    assert check_info(dst, manifests_below(dst))[0].endswith("does not list the splits as their manifests do")
    (dst / "_info.json").unlink()
    assert check_info(dst, manifests_below(dst))[0].endswith("is missing")


def test_a_tar_of_ours_is_what_tarfile_reads_and_its_header_is_posix(tmp_path: Path) -> None:
    import tarfile

    block = tar.header("000000001.jpg", 0o12345)
    entry = tarfile.TarInfo.frombuf(block, "ascii", "strict")  # checks the checksum
    assert (entry.name, entry.size, entry.type, entry.mtime) == ("000000001.jpg", 0o12345, b"0", 0)
    assert block[257:265] == b"ustar\x0000"
    assert len(block) == 512
    assert struct.unpack("8s", block[148:156])[0] == b"%06o\0 " % (sum(block) - sum(block[148:156]) + 8 * 32)


def test_sha256_of_reads_files_larger_than_its_buffer(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(2**20 + 17)
    (tmp_path / "x").write_bytes(data)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_class_tree_and_verify_agree_on_one_sample_per_shard(tmp_path: Path) -> None:
    src = class_tree(tmp_path / "src", per_class=1)
    pack(imagefolder.open_source(src, "train"), tmp_path / "dst", PackOptions(shard_size=1))
    assert faults(tmp_path / "dst", full=True) == []


# All of a split


def found_by_verify(dst: Path) -> list[str]:
    """All that `shard_tools verify --full` says, or why it cannot begin."""
    try:
        manifests = manifests_below(dst)
        return check_info(dst, manifests) + [fault for manifest in manifests for fault in check(manifest, full=True)]
    except ShardError as error:
        return [str(error)]


FILES = ("train/train-000001.tar", "train/train-000001.idx", "train/index.npy", "train/manifest.json", "_info.json")


@pytest.mark.fault("one flipped bit in any file of a split", "verify finds it", exit_code=7)
def test_any_flipped_bit_of_any_file_is_found(good: Path, tmp_path: Path, record_property) -> None:
    """Of every byte one bit; in the usual suite, of some bytes."""
    dst = Path(shutil.copytree(good, tmp_path / "dst"))
    rng, tried, missed = random.Random(4), 0, []
    for name in FILES:
        path = dst / name
        data = path.read_bytes()
        places = range(len(data)) if times(0, 1) else rng.sample(range(len(data)), 60)
        for place in places:
            damaged = bytearray(data)
            damaged[place] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            tried += 1
            if not found_by_verify(dst):
                missed.append((name, place))
        path.write_bytes(data)
    assert missed == []
    assert found_by_verify(dst) == []
    record_property("seen", f"{tried} of {tried} found")


@pytest.mark.fault("any file of a split cut, at any 512 bytes and between", "verify finds it", exit_code=7)
def test_any_cut_of_any_file_is_found(good: Path, tmp_path: Path, record_property) -> None:
    dst = Path(shutil.copytree(good, tmp_path / "dst"))
    rng, tried, missed = random.Random(5), 0, []
    for name in FILES:
        path = dst / name
        data = path.read_bytes()
        step = times(2048, 512)
        inside = rng.sample(range(len(data)), min(len(data), times(5, 200)))
        for length in {*range(0, len(data), step), *inside, len(data) - 1}:
            path.write_bytes(data[:length])
            tried += 1
            if not found_by_verify(dst):
                missed.append((name, length))
        path.write_bytes(data)
    assert missed == []
    record_property("seen", f"{tried} of {tried} found")


def _folder_for_a_file(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE: dict[str, Callable[[Path, Path], object]] = {  # of the first two shards
    "a missing shard": lambda a, b: b.unlink(),
    "a missing .idx": lambda a, b: b.with_suffix(".idx").unlink(),
    "a missing index": lambda a, b: b.with_name("index.npy").unlink(),
    "a missing manifest": lambda a, b: b.with_name("manifest.json").unlink(),
    "an extra shard": lambda a, b: shutil.copyfile(a, a.with_name("train-000009.tar")),
    "swapped shards": lambda a, b: swap(a, b),
    "swapped .idx files": lambda a, b: swap(a.with_suffix(".idx"), b.with_suffix(".idx")),
    "a shard in the place of another": lambda a, b: shutil.copyfile(a, b),
    "a folder in the place of a shard": lambda a, b: _folder_for_a_file(b),
    "bytes behind the end": lambda a, b: b.write_bytes(b.read_bytes() + b"x"),
    "an empty shard": lambda a, b: b.write_bytes(b""),
    "a shard of zeros": lambda a, b: b.write_bytes(bytes(b.stat().st_size)),
}


@pytest.mark.fault(
    "shards missing, extra, swapped, doubled, emptied; index files missing or swapped", "verify finds it", exit_code=7
)
def test_every_exchange_of_files_is_found(good: Path, tmp_path: Path, record_property) -> None:
    for number, (kind, damage) in enumerate(DAMAGE.items()):
        dst = Path(shutil.copytree(good, tmp_path / str(number)))
        damage(dst / "train/train-000000.tar", dst / "train/train-000001.tar")
        assert found_by_verify(dst), kind
    record_property("seen", f"{len(DAMAGE)} of {len(DAMAGE)} kinds")


def test_one_pass_finds_in_a_tar_what_tarfile_finds(good: Path, tmp_path: Path) -> None:
    """Headers of every kind of damage: the walk of `--full` goes on where tarfile does, to the same members."""
    data = (good / "train/train-000000.tar").read_bytes()
    path, same = tmp_path / "x.tar", 0
    for seed in range(times(300, 20_000)):
        path.write_bytes(mutated_tar(data, random.Random(seed)))
        with ShardStream(path) as stream:
            try:
                ours = [(s.key, s.members, s.label, s.meta) for s in stream.samples()]
            except NotPlain:
                continue
            except ShardError:
                with pytest.raises(ShardError):
                    read_samples(path)
                continue
        assert ours == [(s.key, s.members, s.label, s.meta) for s in read_samples(path)]
        same += 1
    assert same > 20


def test_one_pass_hashes_what_it_passes_over(tmp_path: Path) -> None:
    """Members larger than the window, and a long tail behind the end of the tar."""
    rng = random.Random(1)
    parts = [("0.jpg", rng.randbytes(3 * 2**20 + 1)), ("0.bin", rng.randbytes(2**21)), ("1.png", rng.randbytes(77))]
    data = b"".join(tar.member(*part) for part in parts) + tar.END + rng.randbytes(2**20 + 5)
    (tmp_path / "x.tar").write_bytes(data)
    with ShardStream(tmp_path / "x.tar") as stream:
        first, second = stream.samples()
        assert stream.sha256() == hashlib.sha256(data).hexdigest()
    assert (first.crc32, second.crc32) == ({"jpg": zlib.crc32(parts[0][1])}, {"png": zlib.crc32(parts[2][1])})


def test_decode_finds_what_was_bad_before_it_was_packed(tmp_path: Path) -> None:
    manifest = write_split(tmp_path, [("jpg", jpeg(1)), ("jpg", jpeg(2)[:300])])
    assert not any("no good image" in fault for fault in check(manifest, full=True))
    assert any("000000001.jpg is no good image" in fault for fault in check(adopted(manifest), decode=True))


def adopted(manifest: Manifest) -> Manifest:
    return replace(manifest, source={"kind": "adopted"})
