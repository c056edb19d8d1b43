"""Commands on shards behind a URL: the same weights, the same splits, and no credentials in what a run keeps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fastssl import config, train
from fastssl.evaluate.splits import find_test, train_and_test
from shard_tools.index import info_bytes
from shard_tools.manifest import Manifest, ShardError
from shard_tools.remote import Access
from tests.fastssl.runs import settings, state
from tests.servers import serving
from tests.shards import write_split


@pytest.fixture
def splits(tiny_files, tmp_path) -> Path:
    """Splits train and val, with the _info.json that says so."""
    labels = [i % 4 for i in range(61)]
    folder = tmp_path / "shards"
    manifests = [write_split(folder, tiny_files, labels, split=split) for split in ("train", "val")]
    (folder / "_info.json").write_bytes(info_bytes(folder, manifests))
    return folder


def test_a_run_from_a_url_ends_in_the_weights_of_a_local_run_and_keeps_no_credentials(tiny_shards, tmp_path):
    local, remote = tmp_path / "local", tmp_path / "remote"
    more = ["loader.backend=exact", "run.stop_after=2steps", "loader.order=window", "loader.window=2"]
    assert train.run(config.load(settings(tiny_shards, local, *more))) == 0
    with serving(tiny_shards) as server:
        url = server.url.replace("http://", "http://someone:hush1@") + "?signature=hush2"
        more = [*more, f"data.remote.cache={tmp_path / 'cache'}"]
        assert train.run(config.load([*settings(Path(), remote, *more), f"data.root='{url}'"])) == 0
    ours, theirs = state(remote), state(local)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    kept = b"".join(path.read_bytes() for path in remote.rglob("*") if path.is_file())
    assert server.url.encode() in kept
    assert b"hush" not in kept


def test_the_splits_of_an_evaluation_are_found_behind_a_url(splits, tmp_path):
    access = Access("ranges", str(tmp_path / "cache"))
    with serving(splits) as server:
        ours = train_and_test(server.url, "train", access=access)
        assert [manifest.digest for manifest in ours] == [m.digest for m in train_and_test(str(splits), "train")]
        assert find_test(server.url, "train", access).split == "train"
        (splits / "_info.json").unlink()
        with pytest.raises(ShardError, match=r"lists no split test or val, only nothing; name one"):
            find_test(server.url, access=access)
    assert find_test(splits.as_uri()).digest == Manifest.load(splits, "val").digest


def test_a_run_may_go_on_from_a_copy_of_its_shards_behind_a_url(tiny_shards, tmp_path, capsys):
    run_dir = tmp_path / "run"
    more = ["loader.backend=exact", "run.stop_after=2steps"]
    assert train.run(config.load(settings(tiny_shards, run_dir, *more))) == 0
    with serving(Path(shutil.copytree(tiny_shards, tmp_path / "copy"))) as server:
        more = ["loader.backend=exact", "run.stop_after=4steps", "data.remote.read=ranges"]
        more += [f"data.remote.cache={tmp_path / 'cache'}", f"data.root={server.url}"]
        assert train.run(config.load([*settings(Path(), run_dir, *more)])) == 0
    assert "resumed at step 2" in capsys.readouterr().err
