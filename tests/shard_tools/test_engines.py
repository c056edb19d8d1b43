"""Engines: on processes or on a cluster, with workers that die, a pack has the bytes of one made in this process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client, LocalCluster

from shard_tools import engines_dask
from shard_tools.cli import main
from shard_tools.engines import on_cluster
from shard_tools.manifest import Manifest, ShardError
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import Source, imagefolder
from shard_tools.verify import check
from tests.shard_tools.builders import class_tree, hashes, plant

pytestmark = pytest.mark.dist
OPTIONS = PackOptions(shard_size=16, on_bad="quarantine")


class SlowRead:
    """Reads as the source does, but takes its time, and can be told to wait: long enough for a worker to be killed."""

    def __init__(self, source: Source, seconds: float):
        self.read, self.seconds = source.read, seconds

    def __call__(self, item):
        time.sleep(self.seconds)
        return self.read(item)


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    src = class_tree(tmp_path_factory.mktemp("src"), per_class=60)
    return plant(src, {"ant/bad.jpg": b"bad", "bee/bad.jpg": b"worse", "cat/bad.jpg": b""})


@pytest.fixture(scope="module")
def whole(src: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of a pack in this process."""
    dst = tmp_path_factory.mktemp("whole")
    pack(imagefolder.open_source(src, "train"), dst, OPTIONS)
    return hashes(dst)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as running:
        yield running


def pids(cluster: LocalCluster) -> set[int]:
    with Client(cluster.scheduler_address, set_as_default=False) as client:
        return set(client.run(os.getpid).values())


def slow(src: Path, seconds: float) -> Source:
    source = imagefolder.open_source(src, "train")
    return Source(
        **{**{name: getattr(source, name) for name in source.__dataclass_fields__}, "read": SlowRead(source, seconds)}
    )


def when_shards_are_there(folder: Path, number: int, then) -> threading.Thread:
    def watch() -> None:
        deadline = time.monotonic() + 30
        while len(list(folder.glob("train-*.tar"))) < number and time.monotonic() < deadline:
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("shard_bytes", [0, 30_000])
def test_a_cluster_gives_the_bytes_of_this_process(
    src: Path, tmp_path: Path, cluster: LocalCluster, shard_bytes: int
) -> None:
    source = imagefolder.open_source(src, "train")
    options = PackOptions(shard_size=16, shard_bytes=shard_bytes, on_bad="quarantine")
    pack(source, tmp_path / "here", options)
    pack(source, tmp_path / "there", options, on_cluster(cluster.scheduler_address))
    assert hashes(tmp_path / "there") == hashes(tmp_path / "here")


def test_a_worker_that_is_killed_in_the_middle_changes_nothing(
    src: Path, whole: dict[str, str], tmp_path: Path, cluster: LocalCluster
) -> None:
    before = pids(cluster)
    victim = min(before)
    killer = when_shards_are_there(tmp_path / "train", 3, lambda: os.kill(victim, signal.SIGKILL))
    packed = pack(slow(src, 0.02), tmp_path, OPTIONS, on_cluster(cluster.scheduler_address))
    killer.join()
    assert victim not in pids(cluster)
    assert packed.num_shards_kept == 0
    assert hashes(tmp_path) == whole
    assert check(Manifest.load(tmp_path), full=True) == []


def test_a_pack_begun_on_a_cluster_that_goes_away_is_continued_here(
    src: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    with LocalCluster(n_workers=1, threads_per_worker=1, processes=True, dashboard_address=":0") as doomed:
        address = doomed.scheduler_address
        closer = when_shards_are_there(tmp_path / "train", 3, doomed.close)
        with pytest.raises(ShardError, match="the dask scheduler is gone; complete shards are kept"):
            pack(slow(src, 0.02), tmp_path, OPTIONS, on_cluster(address))
        closer.join()
    assert not list(tmp_path.rglob("*.partial"))
    assert pack(imagefolder.open_source(src, "train"), tmp_path, OPTIONS).num_shards_kept >= 3
    assert hashes(tmp_path) == whole


def test_an_engine_that_is_not_installed_is_named_with_its_extra(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "shard_tools.engines_dask")
    words = ["pack", "imagefolder", str(src), str(tmp_path), "--engine", "dask", "--scheduler", "tcp://127.0.0.1:1"]
    assert main(words) == 2
    assert "pip install 'fastssl-train[cluster]'" in capsys.readouterr().err


def test_a_scheduler_that_does_not_answer_is_one_sentence(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines_dask, "_TIMEOUT_S", 0.5)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{unused.getsockname()[1]}"
        words = ["pack", "imagefolder", str(src), str(tmp_path), "--engine", "dask"]
        assert main([*words, "--scheduler", address]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: no dask scheduler answers at {address}")
    assert main(words) == 2
    assert "--engine dask needs --scheduler ADDRESS" in capsys.readouterr().err
    assert main([*words[:4], "--scheduler", address]) == 2
    assert "--scheduler only matters to --engine dask" in capsys.readouterr().err


class Elsewhere:
    """Reads files only in the process that made it, as if SRC were mounted on one machine."""

    def __init__(self, source: Source):
        self.read, self.pid = source.read, os.getpid()

    def __call__(self, item):
        if os.getpid() != self.pid:
            raise FileNotFoundError(2, "No such file or directory")
        return self.read(item)


def test_workers_that_do_not_see_the_source_stop_the_pack_instead_of_quarantining_it(
    src: Path, tmp_path: Path, cluster: LocalCluster
) -> None:
    source = imagefolder.open_source(src, "train")
    blind = Source(source.kind, source.split, source.items, source.classes, Elsewhere(source))
    with pytest.raises(ShardError, match="mount SRC under the same path on every worker"):
        pack(blind, tmp_path, OPTIONS, on_cluster(cluster.scheduler_address))


def test_workers_with_several_threads_are_refused(src: Path, tmp_path: Path) -> None:
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address=":0") as wrong,
        pytest.raises(ShardError, match="runs 2 threads, but decoding needs a process each"),
    ):
        pack(imagefolder.open_source(src, "train"), tmp_path, OPTIONS, on_cluster(wrong.scheduler_address))
