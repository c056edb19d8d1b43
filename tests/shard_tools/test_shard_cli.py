"""The command line: every command works as its help says, and every error is one sentence with exit code 2."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from shard_tools.cli import main
from shard_tools.manifest import Manifest
from tests.shard_tools.builders import ROOT, class_tree, jpeg, plant, shell

ROOM = ROOT / "shard_tools"


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return class_tree(tmp_path_factory.mktemp("src"))


@pytest.fixture(scope="module")
def dst(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dst")
    assert main(["pack", "imagefolder", str(src), str(folder), "--shard-size", "10", "--workers", "1"]) == 0
    return folder


def test_the_module_packs_verifies_describes_and_extracts_from_a_shell(src: Path, tmp_path: Path) -> None:
    done = shell("pack", "imagefolder", src, tmp_path / "dst", "--workers", 2, "--shard-bytes", "20kB")
    assert re.match(
        r"train: 21 images in \d+ shards, 0\.\d MB in .*; .* images/s, .* MB/s\n  classes    3\n", done.stdout
    )
    assert done.stderr == ""  # quiet where no terminal is
    assert (
        "good (hashes and structure, of every byte)" in shell("verify", tmp_path / "dst", "--full", cwd=tmp_path).stdout
    )
    shell("extract", tmp_path / "dst", "--keys", "0", "3-5", "20", tmp_path / "out")
    assert len(list((tmp_path / "out").iterdir())) == 5
    document = json.loads(shell("info", tmp_path / "dst", "--json", "--stats").stdout)
    (split,) = document["splits"]
    assert (split["num_samples"], split["num_classes"], split["samples_per_class"]) == (21, 3, [7, 7])
    assert "already packed" in shell("pack", "imagefolder", src, tmp_path / "dst", "--shard-bytes", "20kB").stdout


def test_pack_demo_needs_no_source_and_makes_both_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shard_tools.sources.demo.NUM_PATCHES", {"train": 60, "test": 30})
    assert main(["pack", "demo", str(tmp_path), "--workers", "1"]) == 0
    assert Manifest.load(tmp_path, "train").num_samples == 60
    assert Manifest.load(tmp_path, "test").num_samples == 30
    assert (tmp_path / "train/ATTRIBUTION.txt").is_file()
    assert "test: 30 images in 1 shard, " in capsys.readouterr().out


@pytest.mark.parametrize(("source", "names"), [("imagefolder", "train val test"), ("cifar10", "train test")])
def test_pack_takes_every_split_that_the_source_has(tmp_path: Path, source: str, names: str) -> None:
    for split in ("test", "train", "val"):
        class_tree(tmp_path / "src" / split, per_class=2)
    assert main(["pack", source, str(tmp_path / "src"), str(tmp_path / "dst"), "--workers", "1"]) == 0
    packed = {path.parent.name for path in (tmp_path / "dst").glob("*/manifest.json")}
    assert packed == set(names.split())


def test_pack_imagenet_takes_train_and_a_flat_val_with_its_labels_and_else_packs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = plant(tmp_path / "src", {"train/n00000001/a.JPEG": jpeg(1), "val/b.JPEG": jpeg(2), "test/c.JPEG": jpeg(3)})
    words = ["pack", "imagenet", str(src), str(tmp_path / "dst"), "--workers", "1"]
    assert main(words) == 2
    assert "give its ground truth with --val-labels, or pack the rest with --split train" in capsys.readouterr().err
    assert not (tmp_path / "dst").exists()
    (tmp_path / "labels.txt").write_text("n00000001\n")
    assert main([*words, "--val-labels", str(tmp_path / "labels.txt")]) == 0
    assert [Manifest.load(tmp_path / "dst", split).num_samples for split in ("train", "val")] == [1, 1]
    assert not (tmp_path / "dst" / "test").exists()


def test_index_adopts_and_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plant(tmp_path, {"a.jpg": jpeg(1), "names.txt": b"zero\none\n"})
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "a.jpg", "a.jpg")
    assert main(["index", str(tmp_path), "--split", "val"]) == 0
    assert capsys.readouterr().out.startswith("val: 1 image in 1 shard, ")


@pytest.mark.parametrize("words", [[], ["pack"], ["verify"], ["info"], ["index"], ["extract"], ["pack", "imagenet"]])
def test_every_command_has_help_with_an_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    assert "example: shard_tools " in capsys.readouterr().out


def test_version_is_that_of_the_distribution(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert re.fullmatch(r"shard_tools (\d+\.\d+.*|not installed)\n", capsys.readouterr().out)


BAD_INPUT = {
    "": "COMMAND",
    "bake": "invalid choice: 'bake'",
    "pack zip SRC DST": "invalid choice: 'zip'",
    "pack files": "SRC, DST",
    "pack files NOWHERE DST": "no such folder: NOWHERE",
    "pack files FILE DST": "no such folder: FILE",
    "pack files EMPTY DST": "has no images for the split 'train'",
    "pack files SRC DST --split ../x": "--split is '../x'",
    "pack files SRC DST --shard-size 0": "--shard-size is 0, but must be at least 1",
    "pack files SRC DST --shard-size many": "invalid int value: 'many'",
    "pack files SRC DST --shard-bytes lots": "'lots' is no size such as 500MB",
    "pack files SRC DST --workers 0": "--workers is 0",
    "pack files SRC DST --seed -1": "--seed is -1",
    "pack files SRC DST --quality 80": "--quality only matters to a resize",
    "pack files SRC DST --max-side 0": "at least 1 px",
    "pack files SRC DST --max-side 9 --quality 101": "between 1 and 100",
    "pack files SRC DST --max-side 9 --quality 0": "between 1 and 100",
    "pack files SRC DST --max-side 9 --short-side 9": "not allowed with",
    "pack files SRC DST --on-bad ignore": "invalid choice: 'ignore'",
    "pack files SRC DST --subset-file NOWHERE": "NOWHERE cannot be read",
    "pack files SRC DST --subset-file FILE": "1 of 1 names are not in the source",
    "pack files SRC DST --val-labels FILE": "unrecognized arguments",
    "pack imagenet SRC DST": "has no class folders such as n01440764",
    "pack cifar10 SRC DST --split val": "only train and test",
    "pack webdataset NOWHERE.tar DST": "1 of 1 shards are missing",
    "pack demo DST --split val": "only train and test",
    "pack files SRC FILE": "FILE",
    "pack files SRC SRC/shards": "lies inside SRC",
    "pack files . DST": "lies inside SRC",
    "pack webdataset GOOD GOOD --overwrite": "lies inside SRC",
    "pack webdataset GOOD/train GOOD --overwrite": "lies inside SRC",
    "pack webdataset GOOD/train/train-{000000..000002}.tar GOOD --overwrite": "lies inside SRC",
    "verify NOWHERE": "no such folder of shards",
    "verify EMPTY": "no manifest.json in EMPTY",
    "info EMPTY": "no manifest.json in EMPTY",
    "index EMPTY": "holds no .tar files",
    "index NOWHERE": "no such folder of shards",
    "extract GOOD --keys 1": "arguments are required: OUT",
    "extract GOOD --keys x OUT": "the key 'x' is neither",
    "extract GOOD --keys 21 OUT": "the key '21' is out of range: samples go from 0 to 20",
    "extract GOOD --keys 0-999999999999 OUT": "out of range",
    "extract GOOD --keys 0 --split val OUT": "only train",
    "extract GOOD --keys 0 FILE": "FILE",
}


@pytest.mark.parametrize("words", BAD_INPUT)
def test_bad_input_is_one_sentence_and_exit_code_2(
    words: str,
    src: Path,
    dst: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(plant(tmp_path, {"FILE": b"no such name\n"}))
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "SRC").symlink_to(src)
    (tmp_path / "GOOD").symlink_to(dst)
    try:
        code: Any = main(words.split())
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert BAD_INPUT[words] in err


def test_verify_lists_every_fault_and_fails(dst: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = shutil.copytree(dst, tmp_path / "copy")
    (copy / "train/train-000000.tar").unlink()
    (copy / "train/train-000002.idx").write_bytes(b"")
    assert main(["verify", str(copy)]) == 7
    captured = capsys.readouterr()
    assert captured.out == "train: 21 images in 3 shards: 2 faults\n"
    assert captured.err.count("\n") == 3
    assert captured.err.splitlines()[-1].startswith(f"error: {copy} has 2 faults; restore the files named above")


def test_a_subset_file_may_have_blank_lines_and_carriage_returns(src: Path, tmp_path: Path) -> None:
    plant(tmp_path, {"list.txt": b"\r\nant/000.jpg\r\n  bee/001.jpg  \n\n"})
    words = ["pack", "imagefolder", str(src), str(tmp_path / "dst"), "--subset-file", str(tmp_path / "list.txt")]
    assert main([*words, "--workers", "1"]) == 0
    assert Manifest.load(tmp_path / "dst").num_samples == 2


def test_names_with_control_characters_do_not_reach_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path / "src", {"\x1b[31mred.jpg": b"bad", "good.jpg": jpeg(1)})
    words = ["pack", "files", str(tmp_path / "src"), str(tmp_path / "dst"), "--workers", "1"]
    assert main(words) == 2
    assert main([*words, "--on-bad", "quarantine"]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert r"\x1b[31mred.jpg" in captured.out


def test_a_reader_that_has_seen_enough_is_no_error(dst: Path) -> None:
    command = f"'{sys.executable}' -m shard_tools info '{dst}' --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


@pytest.mark.parametrize("hide_rich", [False, True])
def test_a_terminal_sees_images_and_megabytes_a_second(src: Path, tmp_path: Path, hide_rich: bool) -> None:
    main_end, child_end = pty.openpty()
    code = "import sys; from shard_tools import cli, progress; progress._PLAIN_EVERY_S = 0;"
    code += "sys.modules['rich'] = None;" if hide_rich else ""
    code += "sys.exit(cli.main(sys.argv[1:]))"
    command: list[Any] = [sys.executable, "-c", code, "pack", "imagefolder", src, tmp_path, "--workers", "1"]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=child_end, cwd=ROOT, env=env)
    os.close(child_end)
    seen = b""
    try:
        while piece := os.read(main_end, 65536):
            seen += piece
    except OSError:  # how Linux says that the other end of a pty is closed
        pass
    os.close(main_end)
    assert child.wait() == 0
    assert b"21/21" in seen
    assert re.search(rb"\d+ images/s, \d+\.\d MB/s", seen)


# What a module imports where it is asked for, and does without where it is not.
_AT_WILL = {
    "checksum.py": {"isal"},
    "progress.py": {"rich"},
    "galaxies.py": {"galsim", "h5py"},
    "hdf5.py": {"h5py"},
    "fits.py": {"astropy"},
    "remote.py": {"fsspec"},
    "engines_dask.py": {"distributed"},
}


@pytest.mark.parametrize("path", sorted(ROOM.rglob("*.py")), ids=lambda path: path.relative_to(ROOM).as_posix())
def test_the_room_needs_numpy_and_pillow_only(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").partition(".")[0])
    allowed = {"shard_tools", "numpy", "PIL"} | _AT_WILL.get(path.name, set())
    assert imported - set(sys.stdlib_module_names) <= allowed
    assert not imported & {"pickle", "subprocess", "marshal", "shelve", "http", "socket"}
    assert ("urllib" in imported) == (path.name == "remote.py")  # to take URLs apart
