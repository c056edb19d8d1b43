"""URLs as places of shards: which are understood, what is believed of a server, and what the commands say of them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shard_tools.cli import main
from shard_tools.manifest import Manifest, ShardError, splits
from shard_tools.pack import PackOptions, pack
from shard_tools.remote import Access, RemoteFolder, locate, shown
from shard_tools.sources import imagefolder
from tests.servers import FaultyServer, serving
from tests.shard_tools.builders import class_tree


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 labelled samples in 5 shards, as splits train and val."""
    folder = tmp_path_factory.mktemp("remote")
    src = class_tree(folder / "src")
    for split in ("train", "val"):
        pack(imagefolder.open_source(src, split), folder / "dst", PackOptions(shard_size=5))
    return folder / "dst"


@pytest.fixture
def served(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """The same behind a URL, in a folder that a test may damage; the cache is tmp_path/cache."""
    monkeypatch.setenv("FASTSSL_CACHE", str(tmp_path / "cache"))
    with serving(Path(shutil.copytree(packed, tmp_path / "served"))) as server:
        yield server


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize(
    ("url", "printed"),
    [
        ("https://key:secret@host.org:8080/a/b/?sig=x#y", "https://host.org:8080/a/b"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("s3://bucket/a b/", "s3://bucket/a b"),
        ("s3://id:secret@bucket/a", "s3://bucket/a"),
        ("/data/a?b", "/data/a?b"),
    ],
)
def test_what_is_printed_of_a_url_has_no_credentials(url: str, printed: str) -> None:
    assert shown(url) == printed


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("ftp://host/a", "unknown protocol; use a folder, or one of file://, s3://"),
        ("simplecache::s3://bucket/a", "unknown protocol"),
        ("s3:///a", "names no host or bucket; write s3://NAME/PATH"),
        ("https://?x", "names no host or bucket"),
        ("file://elsewhere/a", "names another host"),
    ],
)
def test_a_url_that_means_no_folder_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(ShardError, match=complaint):
        locate(url)


def test_names_are_joined_before_the_query_and_quoted() -> None:
    folder = RemoteFolder("https://host/a/b/?token=1")
    assert (folder / "x#1 %.tar").url == "https://host/a/b/x%231%20%25.tar?token=1"
    assert folder.parent.url == "https://host/a?token=1"
    assert (RemoteFolder("s3://bucket") / "train").url == "s3://bucket/train"
    assert locate("file:///a%20b") == Path("/a b")


@pytest.mark.parametrize(("key", "value"), [("cache_gb", 0.0), ("cache_gb", -1.0), ("timeout_s", 0.0), ("attempts", 0)])
def test_settings_that_cannot_be_are_refused_by_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"data\.remote\.{key} is {value}"):
        Access(**{key: value})


def test_the_splits_of_a_url_are_those_it_lists(served: FaultyServer) -> None:
    assert splits(served.url) == ["train", "val"]
    (served.folder / "_info.json").write_text('{"splits": {"../x": {}}}')
    with pytest.raises(ShardError, match="lists no splits"):
        splits(served.url)
    (served.folder / "_info.json").unlink()
    assert splits(served.url) == []


def test_info_and_verify_say_of_a_url_what_they_say_of_the_folder(
    served: FaultyServer, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["info"], ["info", "--json"], ["info", "--stats"], ["verify"], ["verify", "--full"]):
        more = ["--workers", "1"] if command[-1] in ("--stats", "--full") else []
        assert run(capsys, *command, served.url, *more) == run(capsys, *command, str(packed), *more)


def test_extract_writes_the_same_files_from_a_url(
    served: FaultyServer, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, out in ((served.url, "ours"), (str(packed), "theirs")):
        assert run(capsys, "extract", place, "--keys", "0", "17", str(tmp_path / out))[0] == 0
    ours, theirs = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("ours", "theirs"))
    assert ours == theirs


def test_verify_names_every_fault_behind_a_url(served: FaultyServer, capsys: pytest.CaptureFixture[str]) -> None:
    train = served.folder / "train"
    (train / "train-000000.tar").unlink()
    os.truncate(train / "train-000001.tar", 4096)
    (train / "train-000002.idx").write_bytes(b"v1.2 0\n")
    code, _, said = run(capsys, "verify", f"{served.url}/train")
    url = f"{served.url}/train"
    assert code == 7
    assert f"{url}/train-000000.tar does not exist" in said
    assert f"{url}/train-000001.tar has 4096 bytes, but its manifest says" in said
    assert f"{url}/train-000002.idx is not the file that was packed" in said
    assert f"{url} has 3 faults" in said


def test_verify_full_finds_a_flipped_bit_behind_a_url(served: FaultyServer, capsys: pytest.CaptureFixture[str]) -> None:
    path = served.folder / "train/train-000003.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    assert run(capsys, "verify", served.url)[0] == 0
    code, _, said = run(capsys, "verify", served.url, "--full", "--workers", "1")
    assert code == 7
    assert f"{served.url}/train/train-000003.tar is not the file that was packed (its sha256 differs" in said


def test_bad_urls_are_one_sentence_and_exit_code_2(served: FaultyServer, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run(capsys, "info", f"{served.url}/nothing")
    assert (code, said.count("\n")) == (2, 1)
    assert f"neither {served.url}/nothing/manifest.json nor {served.url}/nothing/train/manifest.json is there" in said
    with pytest.raises(SystemExit) as stopped:
        main(["info", "ftp://key:secret@host/a"])
    said = capsys.readouterr().err
    assert (stopped.value.code, said.count("\n")) == (2, 1)
    assert "unknown protocol" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"digest": "0" * 64}, "was changed after packing"),
        ({"split": "../../train"}, "is no manifest"),
        ({"shards": [{"name": "../x.tar"}]}, "is no manifest"),
        ({"num_samples": 10**9}, "is no manifest"),
    ],
)
def test_a_hostile_manifest_is_refused_and_writes_nothing(
    change: dict[str, Any], complaint: str, served: FaultyServer, tmp_path: Path
) -> None:
    path = served.folder / "train/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ShardError, match=complaint):
        Manifest.load(served.url)
    assert set(tmp_path.rglob("*")) == before


def test_an_index_that_is_not_the_packed_one_is_not_kept(served: FaultyServer, tmp_path: Path) -> None:
    path = served.folder / "train/index.npy"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"x")
    with pytest.raises(ShardError, match=r"/train/index\.npy is not the file that was packed \(its sha256 differs"):
        Manifest.load(served.url)
    with path.open("ab") as file:
        file.truncate(2**30)
    with pytest.raises(ShardError, match="has 1,073,741,824 bytes, more than its manifest allows"):
        Manifest.load(served.url)
    assert [found for found in (tmp_path / "cache").rglob("*") if found.is_file()] == []
    assert served.sent["index.npy"] == 2 * len(good)


def test_a_manifest_that_is_too_large_is_not_read(served: FaultyServer) -> None:
    with (served.folder / "train/manifest.json").open("r+b") as file:
        file.truncate(2**40)
    with pytest.raises(ShardError, match="larger than 67108864 bytes"):
        Manifest.load(served.url)
    assert served.sent["manifest.json"] == 0
