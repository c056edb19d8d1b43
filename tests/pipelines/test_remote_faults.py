"""Storage that fails: what passes is retried, what does not is one sentence, and no wrong byte becomes a sample."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipelines.loader import Loader
from pipelines.reader import Reader, whole
from shard_tools.cache import ShardCache
from shard_tools.manifest import Manifest, ShardError
from shard_tools.remote import Access, RemoteError
from tests.pipelines.test_remote import EVAL, LOADER
from tests.servers import FaultyServer, serving

SHARD = "train-000001.tar"  # rows 20 to 39
ROWS = np.arange(20, 40)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr("shard_tools.remote._FIRST_WAIT_S", 0.01)


@pytest.fixture
def server(tiny_shards: Path) -> Iterator[FaultyServer]:
    with serving(tiny_shards) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def access_to(cache: Path, read: str, **options) -> Access:
    return Access(read, str(cache), **{"attempts": 4, "timeout_s": 0.5, **options})


def read_rows(manifest: Manifest, rows: np.ndarray = ROWS) -> list[bytes]:
    reader = Reader(manifest, threads=1)
    try:
        return whole(image for part in reader.request(rows) for image in part.result())
    finally:
        reader.close()


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file() and path.name != "index.npy")


@pytest.mark.parametrize("read", ["shards", "ranges"])
@pytest.mark.parametrize("faults", [[503, 503, 503], [429], [500, 502], ["cut", "cut"], ["hang"], ["cut", 503, "hang"]])
def test_what_passes_is_tried_again_and_the_bytes_are_those_packed(faults, read, server, cache, tiny_files):
    manifest = Manifest.load(server.url, access=access_to(cache, read))
    server.faults = {SHARD: list(faults)}
    assert read_rows(manifest) == [payload for _, payload in tiny_files[20:40]]
    assert server.requests[SHARD] == len(faults) + 1


def test_the_manifest_and_the_index_are_tried_again(server, cache, tiny_shards):
    server.faults = {"manifest.json": [503, "cut"], "index.npy": ["cut", 503]}
    manifest = Manifest.load(server.url, access=access_to(cache, "ranges"))
    assert np.array_equal(manifest.index(), Manifest.load(tiny_shards).index())


@pytest.mark.parametrize("read", ["shards", "ranges"])
@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (503, "HTTP 503"),
        ("cut", "the connection failed"),
        ("hang", "no answer in time"),
    ],
)
def test_what_does_not_pass_is_given_up_with_url_cause_and_remedy(fault, cause, read, server, cache):
    manifest = Manifest.load(server.url, access=access_to(cache, read, attempts=3, timeout_s=0.2))
    server.faults, server.lasting = {SHARD: [fault]}, True
    url = re.escape(f"{server.url}/train/{SHARD}")
    with pytest.raises(
        RemoteError, match=rf"^{url} cannot be read: {cause}.*, in 3 attempts; .*data\.remote\.attempts"
    ):
        read_rows(manifest, ROWS[:9])
    assert server.requests[SHARD] == 3
    assert left_over(cache) == []


@pytest.mark.parametrize("read", ["shards", "ranges"])
@pytest.mark.parametrize("status", [401, 403, 404, 410, 400])
def test_what_the_server_refuses_is_not_tried_again(status, read, server, cache):
    manifest = Manifest.load(server.url, access=access_to(cache, read))
    server.faults, server.lasting = {SHARD: [status]}, True
    with pytest.raises(RemoteError, match=r"must not be read|does not exist|HTTP 400"):
        read_rows(manifest, ROWS[:9])
    assert server.requests[SHARD] == 1


def test_storage_that_fails_ends_a_run_that_replaces_bad_samples(server, cache):
    manifest = Manifest.load(server.url, access=access_to(cache, "shards", attempts=2))
    server.faults, server.lasting = {SHARD: [503]}, True
    with Loader(manifest, EVAL, **LOADER, on_bad="replace") as loader, pytest.raises(RemoteError, match="HTTP 503"):
        list(zip(range(5), loader.batches()))


def test_a_server_without_range_gives_whole_shards_only(server, cache, tiny_files, monkeypatch):
    monkeypatch.setattr("shard_tools.remote._PIECE_BYTES", 4096)
    server.faults, server.lasting = {"*.tar": ["ignore_range"]}, True
    shards = Manifest.load(server.url, access=access_to(cache, "shards"))
    assert read_rows(shards) == [payload for _, payload in tiny_files[20:40]]
    assert server.requests[SHARD] == 1
    ranges = Manifest.load(server.url, access=access_to(cache, "ranges"))
    with pytest.raises(RemoteError, match=r"ignores the Range of a request; use data\.remote\.read=shards"):
        read_rows(ranges, ROWS[3:9])


def test_a_cut_costs_a_piece_and_not_the_shard(server, cache, tiny_files, monkeypatch):
    monkeypatch.setattr("shard_tools.remote._PIECE_BYTES", 4096)
    manifest = Manifest.load(server.url, access=access_to(cache, "shards"))
    server.faults = {SHARD: ["cut", "cut", 503]}
    assert read_rows(manifest) == [payload for _, payload in tiny_files[20:40]]
    assert server.requests[SHARD] == -(-manifest.shards[1].num_bytes // 4096) + 3
    assert server.sent[SHARD] == manifest.shards[1].num_bytes


def test_a_shard_with_other_bytes_is_fetched_again_and_then_refused_by_name(server, cache, tiny_files):
    manifest = Manifest.load(server.url, access=access_to(cache, "shards"))
    server.faults = {SHARD: ["flip"]}
    assert read_rows(manifest) == [payload for _, payload in tiny_files[20:40]]
    shutil.rmtree(manifest.root)
    manifest = Manifest.load(server.url, access=access_to(cache, "shards"))
    server.faults, server.lasting = {SHARD: ["flip"]}, True
    before = server.requests[SHARD]
    url = re.escape(f"{server.url}/train/{SHARD}")
    with pytest.raises(
        ShardError, match=rf"{SHARD}:000000020.jpg cannot be read \({url} is not the file that was packed"
    ):
        read_rows(manifest, ROWS[:9])
    assert server.requests[SHARD] == before + 2 + 9  # twice for the shard, and once for the name of each sample
    assert left_over(cache) == []


@pytest.mark.parametrize("read", ["shards", "ranges"])
def test_samples_with_other_bytes_are_replaced_where_that_is_wanted(read, tiny_shards, cache, tmp_path):
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "served"))
    content = bytearray((folder / "train" / SHARD).read_bytes())
    entry = Manifest.load(tiny_shards).index()[25]
    content[int(entry["offset"]) + 40] ^= 1
    (folder / "train" / SHARD).write_bytes(content)
    with serving(folder) as server:
        manifest = Manifest.load(server.url, access=access_to(cache, read))
        with Loader(manifest, EVAL, **LOADER, on_bad="replace") as loader:
            replaced = [fault for _, batch in zip(range(5), loader.batches()) for fault in batch.replaced]
        with Loader(manifest, EVAL, **LOADER) as loader, pytest.raises(ShardError, match=f"{SHARD}:0000000"):
            list(zip(range(5), loader.batches()))
    named = {int(found[1]) for fault in replaced if (found := re.match(rf"{SHARD}:0+(\d+)", fault))}
    assert 25 in named
    assert named <= (set(ROWS.tolist()) if read == "shards" else {25})  # of the whole shard, no byte is believed


def test_a_shard_that_was_cut_at_the_server_is_named(tiny_shards, cache, tmp_path):
    folder = Path(shutil.copytree(tiny_shards, tmp_path / "served"))
    os.truncate(folder / "train" / SHARD, 5000)
    with serving(folder) as server:
        manifest = Manifest.load(server.url, access=access_to(cache, "shards", attempts=2))
        with pytest.raises(RemoteError, match=rf"{SHARD} cannot be read: it sent 5000 of \d+ bytes from byte 0 on"):
            read_rows(manifest)


def test_a_copy_that_was_damaged_on_the_disk_is_fetched_again_by_the_next_process(server, cache, tiny_files):
    access = access_to(cache, "shards")
    manifest = Manifest.load(server.url, access=access)
    read_rows(manifest)
    copy = manifest.root / SHARD
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    assert read_rows(Manifest.load(server.url, access=access)) == [payload for _, payload in tiny_files[20:40]]
    assert server.requests[SHARD] == 2
    index = manifest.root / "index.npy"
    index.write_bytes(index.read_bytes()[:-1] + b"x")
    assert Manifest.load(server.url, access=access).check_quick() == []


def test_what_a_killed_process_left_makes_room_and_is_never_read(server, cache, tiny_files):
    access = access_to(cache, "shards")
    manifest = Manifest.load(server.url, access=access)
    (manifest.root / f"{SHARD}.partial").write_bytes(b"half a shard")
    (manifest.root / "train-000003.tar.partial").write_bytes(b"x" * manifest.shards[3].num_bytes)
    tight = access_to(cache, "shards", cache_gb=manifest.shards[1].num_bytes / 1e9)
    assert read_rows(Manifest.load(server.url, access=tight)) == [payload for _, payload in tiny_files[20:40]]
    assert left_over(cache) == [SHARD]


def test_a_shard_that_is_held_is_not_evicted(server, cache):
    limit = (
        2.5 * 1e-9 * max(shard.num_bytes for shard in Manifest.load(server.url, access=Access(cache=str(cache))).shards)
    )
    manifest = Manifest.load(server.url, access=access_to(cache, "shards", cache_gb=limit))
    shards = ShardCache(manifest)
    with shards.opened(0):
        for shard in (1, 2, 3):
            with shards.opened(shard):
                assert (manifest.root / "train-000000.tar").is_file()
    for shard in (1, 2):
        with shards.opened(shard) as descriptor:
            assert os.fstat(descriptor).st_nlink == 1
    assert not (manifest.root / "train-000000.tar").exists()


def test_another_process_at_a_download_is_waited_for(server, cache, tiny_files):
    manifest = Manifest.load(server.url, access=access_to(cache, "shards"))
    partial = manifest.root / f"{SHARD}.partial"
    with partial.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        ended = threading.Timer(0.3, lambda: fcntl.flock(other, fcntl.LOCK_UN))
        ended.start()
        began = time.monotonic()
        assert read_rows(manifest) == [payload for _, payload in tiny_files[20:40]]
        assert time.monotonic() - began >= 0.25
        ended.join()


def test_a_shard_larger_than_the_cache_is_refused_with_the_remedy(server, cache):
    manifest = Manifest.load(server.url, access=access_to(cache, "shards", cache_gb=1e-6))
    with pytest.raises(
        ShardError, match=r"more than data\.remote\.cache_gb=1e-06; raise it, or use data\.remote\.read="
    ):
        read_rows(manifest)


@pytest.mark.parametrize("read", ["shards", "ranges"])
def test_close_does_not_wait_for_retries_at_a_server_that_hangs(read, server, cache):
    manifest = Manifest.load(server.url, access=access_to(cache, read, attempts=100, timeout_s=0.3))
    server.faults, server.lasting = {"*.tar": ["hang"]}, True
    loader = Loader(manifest, EVAL, **LOADER, order="window")
    loader.batches()
    time.sleep(0.1)
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("fault", [401, 403, 404, 400, 503, "cut", "hang", "flip", "ignore_range"])
def test_no_message_shows_credentials(fault, server, cache, capsys, caplog):
    url = server.url.replace("http://", "http://someone:hush1@") + "/?signature=hush2"
    manifest = Manifest.load(url, access=access_to(cache, "ranges", attempts=2, timeout_s=0.2))
    server.faults, server.lasting = {"*.tar": [fault]}, True
    with pytest.raises(ShardError) as caught:
        read_rows(manifest, ROWS[3:5])
    server.faults["manifest.json"] = [fault]
    said = "".join(traceback.format_exception(caught.value)) + repr(manifest) + manifest.place + caplog.text
    if fault not in ("flip", "ignore_range"):
        with pytest.raises(ShardError) as caught:
            Manifest.load(url, access=access_to(cache, "ranges", attempts=2, timeout_s=0.2))
        said += "".join(traceback.format_exception(caught.value))
    output = capsys.readouterr()
    assert server.url.rpartition(":")[2] in said
    assert "hush" not in said + output.out + output.err


def test_without_the_extra_the_message_names_it(server, cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(RemoteError, match=r'needs the extra `remote` .*; run `pip install "fastssl-train\[remote\]"`'):
        Manifest.load(server.url, access=access_to(cache, "ranges"))
