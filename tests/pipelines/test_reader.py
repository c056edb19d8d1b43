"""Reader: the packed bytes, whatever the access pattern, or an error that says where."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from pipelines.reader import Reader, _Descriptors, whole
from shard_tools.manifest import Manifest, ShardError


def read(reader: Reader, rows: list[int]) -> list[bytes]:
    return whole(payload for part in reader.request(np.array(rows, dtype=np.int64)) for payload in part.result())


@pytest.fixture
def shards(tiny_shards, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("max_open", [1, 2, 512])
def test_any_rows_in_any_order_are_the_packed_bytes(threads, max_open, tiny_shards, tiny_files, rng, monkeypatch):
    monkeypatch.setattr("pipelines.reader._MAX_OPEN", max_open)
    reader = Reader(Manifest.load(tiny_shards), threads)
    for rows in (list(range(61)), rng.permutation(61).tolist(), [60, 0, 60, 0, 7], []):
        assert read(reader, rows) == [tiny_files[row][1] for row in rows]
    reader.close()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_descriptors_are_bounded_and_closed(tiny_shards, monkeypatch):
    monkeypatch.setattr("pipelines.reader._MAX_OPEN", 2)
    reader = Reader(Manifest.load(tiny_shards), threads=1)
    before = open_files()
    read(reader, list(range(61)))
    assert open_files() <= before + 2
    reader.close()
    assert open_files() == before


def test_a_descriptor_in_use_is_not_closed_to_make_room(tiny_shards, monkeypatch):
    monkeypatch.setattr("pipelines.reader._MAX_OPEN", 1)
    manifest = Manifest.load(tiny_shards)
    descriptors = _Descriptors(manifest)
    with descriptors.opened(0) as first:
        with descriptors.opened(1), descriptors.opened(2):
            pass
        assert os.path.samestat(os.fstat(first), manifest.shard_path(0).stat())
    descriptors.close()


def test_close_ends_the_threads(tiny_shards):
    before = set(threading.enumerate())
    reader = Reader(Manifest.load(tiny_shards), threads=4)
    read(reader, list(range(61)))
    assert set(threading.enumerate()) > before
    reader.close()
    assert set(threading.enumerate()) == before


def test_a_flipped_bit_is_named_with_shard_and_member(shards):
    manifest = Manifest.load(shards)
    entry = manifest.index()[25]
    path = manifest.shard_path(int(entry["shard"]))
    content = bytearray(path.read_bytes())
    content[int(entry["offset"]) + int(entry["size"]) // 2] ^= 4
    path.write_bytes(content)
    reader = Reader(manifest)
    with pytest.raises(ShardError, match=r"train-000001\.tar:000000025\.jpg has other bytes .*verify --full"):
        read(reader, [25])
    assert read(reader, [24, 26])  # the neighbours are still good
    reader.close()


def test_a_shard_cut_while_it_is_read_is_named(shards):
    manifest = Manifest.load(shards)
    reader = Reader(manifest)
    read(reader, [20])
    entry = manifest.index()[25]
    os.truncate(manifest.shard_path(1), int(entry["offset"]) + 10)
    with pytest.raises(ShardError, match=r"train-000001\.tar:000000025\.jpg ends after 10 of \d+ bytes.*verify"):
        read(reader, [25])
    with pytest.raises(ShardError, match=r"train-000001\.tar:.* ends after 0 of \d+ bytes"):
        read(reader, [39])
    reader.close()


def test_a_shard_that_vanishes_is_named(shards):
    manifest = Manifest.load(shards)
    manifest.shard_path(2).unlink()
    reader = Reader(manifest)
    with pytest.raises(ShardError, match=r"train-000002\.tar:.* cannot be read \(No such file.*verify"):
        read(reader, [45])
    reader.close()
