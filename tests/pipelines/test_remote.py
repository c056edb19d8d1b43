"""Shards behind a URL give the batches that they give from a folder, bit for bit, within the limits of the cache."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment import AugmentSpec
from pipelines.loader import Batch, Loader, read_once
from pipelines.order import shard_order, windowed_order
from pipelines.reader import Reader, neighbours
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest
from shard_tools.remote import Access
from tests.servers import FaultyServer, s3_serving, serving
from tests.shards import write_split

ROOT = Path(__file__).parents[2]
SPECS = [ViewSpec("query", 24, augment=AugmentSpec(jitter_p=0.8, brightness=0.4))]
EVAL = [ViewSpec("eval", 32, crop="center", resize=36, augment=AugmentSpec(flip_p=0.0))]
LOADER = {"batch_size": 12, "seed": 7, "backend": "exact", "threads": 1, "window": 2}


@pytest.fixture
def server(tiny_shards: Path) -> Iterator[FaultyServer]:
    with serving(tiny_shards) as server:
        yield server


@pytest.fixture(scope="module")
def bucket(tiny_shards: Path) -> Iterator[str]:
    with s3_serving(tiny_shards) as url:
        yield url


def take(manifest: Manifest, num: int, start: int = 0, **options) -> list[Batch]:
    with Loader(manifest, SPECS, **{**LOADER, **options}) as loader:
        return list(itertools.islice(loader.batches(start), num))


def assert_equal(ours: list[Batch], local: list[Batch]) -> None:
    assert [batch.step for batch in ours] == [batch.step for batch in local]
    for one, other in zip(ours, local):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.labels, other.labels)
        for role in other.views:
            assert all(torch.equal(a, b) for a, b in zip(one.views[role], other.views[role]))


@pytest.mark.parametrize("order", ["global", "window"])
@pytest.mark.parametrize("read", ["shards", "ranges"])
@pytest.mark.parametrize("protocol", ["http", "s3", "file"])
def test_batches_are_those_of_the_local_folder(protocol, read, order, server, bucket, tiny_shards, tmp_path):
    url = {"http": server.url, "s3": bucket, "file": tiny_shards.as_uri()}[protocol]
    manifest = Manifest.load(url, access=Access(read, str(tmp_path)))
    local = Manifest.load(tiny_shards)
    assert manifest == local if protocol == "file" else manifest.digest == local.digest
    assert_equal(take(manifest, 7, order=order), take(local, 7, order=order))
    (again,) = take(manifest, 1, start=6, order=order)
    assert_equal([again], take(local, 7, order=order)[6:])


def test_a_split_is_read_once_in_order_from_a_url(server, tiny_shards, tmp_path):
    for read in ("shards", "ranges"):
        manifest = Manifest.load(server.url, access=Access(read, str(tmp_path)))
        ours, local = (
            list(read_once(m, EVAL, batch_size=8, backend="exact", threads=1))
            for m in (manifest, Manifest.load(tiny_shards))
        )
        assert_equal(ours, local)


RANK = """
import hashlib, itertools, sys
from pipelines.loader import Loader
from shard_tools.manifest import Manifest
from shard_tools.remote import Access
from tests.pipelines.test_remote import LOADER, SPECS

url, cache, rank = sys.argv[1:]
manifest = Manifest.load(url, access=Access(cache=cache))
with Loader(manifest, SPECS, **LOADER, order="window", rank=int(rank), world=2) as loader:
    for batch in itertools.islice(loader.batches(), 5):
        print(*batch.ids.tolist(), hashlib.sha256(batch.views["query"][0].numpy().tobytes()).hexdigest())
"""


def test_two_ranks_share_a_cache_and_fetch_each_shard_once(server, tiny_shards, tmp_path):
    command = [sys.executable, "-c", RANK, server.url, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for rank in range(2)]
    said = [process.communicate(timeout=60)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    local = Manifest.load(tiny_shards)
    for rank, lines in enumerate(said):
        expected = [
            " ".join(map(str, batch.ids.tolist()))
            + " "
            + hashlib.sha256(batch.views["query"][0].numpy().tobytes()).hexdigest()
            for batch in take(local, 5, order="window", rank=rank, world=2)
        ]
        assert lines.splitlines() == expected
    sizes = {shard.name: shard.num_bytes for shard in local.shards}
    assert {name: server.sent[name] for name in sizes} == sizes
    assert server.sent["index.npy"] == (local.root / "index.npy").stat().st_size


def shard_bytes(cache: Path) -> int:
    """Bytes of all shards and downloads in the cache."""
    total = 0
    for path in cache.rglob("*.tar*"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


@pytest.fixture
def many(tiny_files, tmp_path) -> Manifest:
    """61 samples in 21 shards."""
    return write_split(tmp_path / "many", tiny_files, shard_size=3)


def test_the_windowed_order_fetches_each_shard_once_an_epoch_into_a_cache_of_two_windows(many, tmp_path):
    window, cache = 3, tmp_path / "cache"
    largest = max(shard.num_bytes for shard in many.shards)
    limit = (2 * window + 1) * largest
    held: list[int] = []
    with serving(many.root.parent) as server:
        server.on_request = lambda: held.append(shard_bytes(cache))
        access = Access(cache=str(cache), cache_gb=limit / 1e9)
        manifest = Manifest.load(server.url, access=access)
        options = {**LOADER, "order": "window", "window": window, "batch_size": 1}
        with Loader(manifest, EVAL, **options) as loader, Loader(many, EVAL, **options) as local:
            for ours, theirs in zip(loader.batches(), itertools.islice(local.batches(), loader.steps_per_epoch)):
                assert_equal([ours], [theirs])
        tars = {shard.name: server.sent[shard.name] / shard.num_bytes for shard in many.shards}
    held.append(shard_bytes(cache))
    assert max(held) <= limit
    assert len(list(cache.rglob("*.tar"))) < len(many.shards)  # so shards were evicted
    # The batches made ahead have opened the next epoch's first window, while which its second is fetched.
    first_of_next = set(shard_order(len(many.shards), LOADER["seed"], 1)[: 2 * window].tolist())
    for number, shard in enumerate(many.shards):
        assert 1 <= tars[shard.name] <= (2 if number in first_of_next else 1)


def test_a_run_that_starts_in_a_later_window_does_not_fetch_the_earlier_ones(many, tmp_path):
    window, step = 3, 40
    sizes = [shard.num_samples for shard in many.shards]
    order = windowed_order(sizes, LOADER["seed"], 0, window)
    with serving(many.root.parent) as server:
        manifest = Manifest.load(server.url, access=Access(cache=str(tmp_path / "cache"), cache_gb=1))
        options = {**LOADER, "order": "window", "window": window, "batch_size": 1}
        with Loader(manifest, EVAL, **options) as loader:
            batches = loader.batches(step)
            ids = [int(next(batches).ids) for _ in range(10)]
        fetched = {int(name[6:12]) for name in server.sent if name.endswith(".tar")}
    assert ids == order[step : step + 10].tolist()
    places = {shard: place for place, shard in enumerate(shard_order(len(sizes), LOADER["seed"], 0).tolist())}
    opened = (int(places[int(many.index()["shard"][order[step]])]) // window) * window
    assert min(places[shard] for shard in fetched) >= opened


def test_the_next_window_is_fetched_while_one_is_read(many, tmp_path):
    window = 3
    with serving(many.root.parent) as server:
        manifest = Manifest.load(server.url, access=Access(cache=str(tmp_path / "cache"), cache_gb=1))
        options = {**LOADER, "order": "window", "window": window, "batch_size": 1}
        with Loader(manifest, EVAL, **options) as loader:
            batches = loader.batches()
            for _ in range(7):  # of the first window's 9 samples; with prefetch=2, no read has come to the second
                next(batches)
            second = shard_order(len(many.shards), LOADER["seed"], 0)[window : 2 * window - 1].tolist()
            wanted = [manifest.root / manifest.shards[shard].name for shard in second]
            for _ in range(200):
                if all(path.is_file() for path in wanted):
                    break
                time.sleep(0.02)
            assert all(path.is_file() for path in wanted)


@pytest.mark.parametrize(
    ("order", "remedy"), [("global", "use loader.order=window"), ("window", "use a lower loader.window")]
)
def test_a_cache_that_would_thrash_is_refused(order, remedy, many, tmp_path):
    with serving(many.root.parent) as server:
        needed = sum(sorted(shard.num_bytes for shard in many.shards)[-7:])  # two windows and one
        manifest = Manifest.load(server.url, access=Access(cache=str(tmp_path / "c"), cache_gb=(needed - 1) / 1e9))
        with pytest.raises(ValueError, match=rf"cache_gb is .* {remedy}, or data\.remote\.read=ranges"):
            Loader(manifest, EVAL, **{**LOADER, "order": order, "window": 3})
        ranges = Manifest.load(server.url, access=Access("ranges", str(tmp_path / "c"), 1e-9))
        Loader(ranges, EVAL, **{**LOADER, "order": order, "window": 3}).close()


def test_neighbours_are_read_by_one_request_and_no_request_is_too_large(rng, monkeypatch):
    monkeypatch.setattr("pipelines.reader._MAX_GAP", 100)
    monkeypatch.setattr("pipelines.reader._MAX_REQUEST", 5000)
    entries = np.zeros(300, [("shard", "<u4"), ("offset", "<u8"), ("size", "<u8")])
    for shard in range(3):
        sizes, gaps = rng.integers(50, 900, 100), rng.choice([0, 99, 100, 101, 4000], 100)
        of_shard = entries[shard * 100 : (shard + 1) * 100]
        of_shard["shard"], of_shard["size"] = shard, sizes
        of_shard["offset"] = np.cumsum(gaps) + np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rng.shuffle(entries)
    groups = neighbours(entries)
    assert sorted(np.concatenate(groups).tolist()) == list(range(300))
    stretches = []
    for group in groups:
        rows = entries[group]
        ends = rows["offset"] + rows["size"]
        assert len(set(rows["shard"].tolist())) == 1
        assert (np.diff(rows["offset"].astype(np.int64)) > 0).all()
        assert (rows["offset"][1:] <= ends[:-1] + 100).all()
        assert ends[-1] - rows["offset"][0] <= 5000
        stretches.append((int(rows["shard"][0]), int(rows["offset"][0]), int(ends[-1]), int(ends[0])))
    for (shard, first, end, _), (other, start, _, first_end) in itertools.pairwise(sorted(stretches)):
        assert shard != other or start > end + 100 or first_end - first > 5000  # or they would be one


def test_a_batch_of_neighbours_costs_one_request_a_shard(server, tiny_files, tmp_path):
    manifest = Manifest.load(server.url, access=Access("ranges", str(tmp_path)))
    reader = Reader(manifest)
    rows = np.random.default_rng(1).permutation(61)
    (part,) = reader.request(rows)
    assert part.result() == [tiny_files[row][1] for row in rows]
    reader.close()
    assert {name: count for name, count in server.requests.items() if name.endswith(".tar")} == {
        f"train-{number:06d}.tar": 1 for number in range(4)
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_reading_many_cached_shards_keeps_no_descriptor(many, tmp_path):
    with serving(many.root.parent) as server:
        manifest = Manifest.load(server.url, access=Access(cache=str(tmp_path / "cache")))
        reader = Reader(manifest, threads=2)
        [part.result() for part in reader.request(np.arange(61))]
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            [part.result() for part in reader.request(np.arange(61))]
        assert len(os.listdir("/proc/self/fd")) <= before
        reader.close()


def test_what_is_read_once_is_fetched_ahead_and_shard_by_shard(many, tmp_path):
    rows = np.arange(61)[::-1]
    with serving(many.root.parent) as server:
        manifest = Manifest.load(server.url, access=Access(cache=str(tmp_path / "cache")))
        batches = read_once(manifest, EVAL, batch_size=3, backend="exact", threads=1, rows=rows)
        assert next(batches).ids.tolist() == [60, 59, 58]
        expected = {f"train-{number:06d}.tar" for number in range(20, 13, -1)}  # the batches ahead have begun four
        for _ in range(200):
            if expected <= server.sent.keys():
                break
            time.sleep(0.02)
        assert expected <= server.sent.keys()
        assert "train-000002.tar" not in server.sent
        assert [i for batch in batches for i in batch.ids.tolist()] == rows[3:].tolist()
    assert all(server.sent[shard.name] == shard.num_bytes for shard in many.shards)
