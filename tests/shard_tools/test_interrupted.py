"""A pack that is killed, stopped or runs out of space leaves no half shard, and the same command finishes it.

The child process kills itself at the n-th call of a function that touches the disk, so that every step is hit.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from shard_tools import disk
from shard_tools.foreign import read_samples
from shard_tools.manifest import Manifest, ShardError
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import Item, Source, imagefolder
from shard_tools.verify import check
from tests.faults.record import times
from tests.shard_tools import struck
from tests.shard_tools.builders import ROOT, class_tree, hashes, jpeg, plant

ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
ARGS = ["--shard-size", "4", "--on-bad", "quarantine"]

# argv: signal, function to watch, number of its call, before or after, then the command. SIGINT goes to the whole
# group, as from a keyboard.
CHILD = """
import importlib, os, signal, sys
from shard_tools import cli
what, watched, number, when = getattr(signal, sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
module = importlib.import_module(watched.rpartition(".")[0])
name = watched.rpartition(".")[2]
original, calls = getattr(module, name), 0
def strike():
    if what == signal.SIGINT:
        os.killpg(os.getpgrp(), what)
    else:
        os.kill(os.getpid(), what)
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == number and when == "before":
        strike()
    result = original(*args, **kwargs)
    if calls == number and when == "after":
        strike()
    return result
setattr(module, name, counted)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
sys.exit(cli.main(sys.argv[5:]))
"""


@pytest.fixture(scope="module")
def source_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    src = class_tree(tmp_path_factory.mktemp("src"), per_class=6)
    return plant(src, {"ant/bad.jpg": b"bad", "bee/bad.jpg": b"worse"})


@pytest.fixture(scope="module")
def whole(source_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of an uninterrupted pack."""
    dst = tmp_path_factory.mktemp("whole")
    assert run(source_tree, dst).returncode == 0
    return hashes(dst)


def run(src: Path, dst: Path, *child: object, workers: int = 1) -> subprocess.CompletedProcess[str]:
    start = ["-c", CHILD, *map(str, child)] if child else ["-m", "shard_tools"]
    command: list[Any] = [sys.executable, *start, "pack", "imagefolder", src, dst, *ARGS, "--workers", str(workers)]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=60, start_new_session=True)


def no_half_shards(dst: Path) -> None:
    """Whatever bears a final name is whole."""
    folder = dst / "train"
    for path in folder.glob("*.tar"):
        assert path.read_bytes()[-1024:] == bytes(1024)
    if (folder / "manifest.json").exists():
        assert check(Manifest.load(dst), full=True) == [] or (folder / "pack.journal").exists()


CRASH_POINTS = [
    ("os.fsync", 1, "before"),  # the journal's first line
    ("shard_tools.tar.member", 8, "before"),  # in the middle of the first shard
    ("shard_tools.tar.member", 30, "before"),
    ("os.fsync", 3, "before"),  # the first shard, written but not in place
    ("os.replace", 2, "before"),
    ("os.replace", 2, "after"),  # the first shard in place, not its .idx
    ("os.replace", 3, "after"),  # both in place, not journaled
    ("os.fsync", 7, "after"),  # journaled
    ("os.replace", 6, "before"),
    ("os.replace", 10, "after"),
    ("os.replace", 12, "before"),  # index.npy
    ("os.replace", 13, "before"),  # quarantine.txt
    ("os.replace", 14, "before"),  # _info.json
    ("os.replace", 15, "before"),  # the manifest
    ("os.replace", 15, "after"),  # all there, but the journal too
]
TOUCHES = ("os.fsync", "os.replace", "os.unlink", "shard_tools.tar.member")


def words_of(src: Path, dst: Path, workers: int = 1) -> list[str]:
    return ["pack", "imagefolder", str(src), str(dst), *ARGS, "--workers", str(workers)]


def pack_again(src: Path, dst: Path, workers: int = 1) -> None:
    again = struck.start(words_of(src, dst, workers))
    again.join()
    assert again.exitcode == 0


@pytest.mark.fault(
    "SIGKILL before or after any call that touches the disk while packing",
    "no file with its final name is partial; the same command gives the bytes of an uninterrupted pack",
)
def test_kill_9_at_any_step_and_a_rerun_give_the_bytes_of_an_uninterrupted_pack(
    source_tree: Path, whole: dict[str, str], tmp_path: Path, record_property
) -> None:
    for number, point in enumerate(points(source_tree, tmp_path)):
        dst = tmp_path / str(number)
        struck_one = struck.start(words_of(source_tree, dst), *point)
        struck_one.join()
        assert struck_one.exitcode == -signal.SIGKILL, point
        no_half_shards(dst)
        assert hashes(dst) != whole or point[0] != "os.replace", point
        pack_again(source_tree, dst)
        assert hashes(dst) == whole, point
        shutil.rmtree(dst)
    record_property("seen", f"{number + 1} of {number + 1} points")


def points(src: Path, folder: Path) -> Iterator[tuple[str, int, str]]:
    """A few crash points of each kind, or every one."""
    if times(0, 1) == 0:
        yield from CRASH_POINTS
        return
    for watched in TOUCHES:
        for when in ("before", "after"):
            for number in itertools.count(1):
                probe = struck.start(words_of(src, folder / "probe"), watched, number, when)
                probe.join()
                shutil.rmtree(folder / "probe", ignore_errors=True)
                if probe.exitcode == 0:  # it has no such call any more
                    break
                assert probe.exitcode == -signal.SIGKILL, (watched, number, when)
                yield watched, number, when


@pytest.mark.fault(
    "SIGKILL at random moments of a pack",
    "no file with its final name is partial; the same command gives the bytes of an uninterrupted pack",
)
def test_kill_9_at_random_moments_converges_to_the_same_bytes(
    source_tree: Path, whole: dict[str, str], tmp_path: Path, record_property
) -> None:
    moment, kills, finished, count = random.Random(5), 0, 0, times(4, 100)
    pack_again(source_tree, tmp_path / "first")  # starts the fork server
    # The least of several: of moments within a slow one most would come after the end of the others.
    takes_s = {w: min(timed(source_tree, tmp_path / f"{w}-{i}", w) for i in range(3)) for w in (1, 2)}
    dst = tmp_path / "dst"
    while kills < count:
        workers = 2 if kills % 4 == 3 else 1
        child = struck.start(words_of(source_tree, dst, workers))
        least_s = takes_s[2] / 2 if workers == 2 else 0.0  # before that the workers only start
        child.join(moment.uniform(least_s, takes_s[workers]))
        if child.exitcode is None:
            child.kill()
            child.join()
            kills += 1
            if (dst / "train").is_dir():
                no_half_shards(dst)
        else:
            assert child.exitcode == 0
            assert hashes(dst) == whole
            shutil.rmtree(dst)
            finished += 1
    pack_again(source_tree, dst)
    assert hashes(dst) == whole
    record_property("seen", f"{kills} kills, {finished + 1} packs finished between them, all with the same bytes")


def timed(src: Path, dst: Path, workers: int) -> float:
    started = time.monotonic()
    pack_again(src, dst, workers)
    return time.monotonic() - started


def test_workers_end_when_their_parent_is_killed(source_tree: Path, tmp_path: Path) -> None:
    command: list[Any] = [sys.executable, "-c", CHILD, "SIGKILL", "os.fsync", "3", "before"]
    command += ["pack", "imagefolder", source_tree, tmp_path, *ARGS, "--workers", "2"]
    child = subprocess.Popen(command, env=ENV, **QUIET)
    child.wait(timeout=60)
    for _ in range(100):
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a worker outlived its parent by 10 s")


def test_a_rerun_continues_behind_complete_shards_instead_of_starting_over(source_tree: Path, tmp_path: Path) -> None:
    run(source_tree, tmp_path, "SIGKILL", "os.replace", 8, "after")
    first = (tmp_path / "train/train-000000.tar").stat()
    done = run(source_tree, tmp_path)
    assert "continued behind 3 complete shards" in done.stdout
    assert (tmp_path / "train/train-000000.tar").stat().st_mtime_ns == first.st_mtime_ns


def test_a_lost_shard_of_an_interrupted_pack_is_written_again(
    source_tree: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    run(source_tree, tmp_path, "SIGKILL", "os.replace", 8, "after")
    (tmp_path / "train/train-000001.tar").unlink()
    assert "continued behind 1 complete shard;" not in run(source_tree, tmp_path).stdout
    assert hashes(tmp_path) == whole


def test_a_bad_file_ends_a_pack_but_costs_no_shard_that_was_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{number:02d}.jpg": jpeg(number) for number in range(12)}
    items = [Item(name, -1, len(data)) for name, data in files.items()]
    source = Source("files", "train", items, None, lambda item: files[item.name])
    whole = pack(source, tmp_path / "whole", PackOptions(shard_size=4)).manifest
    last = read_samples(whole.shard_path(2))[-1].meta["name"]
    good, files[last] = files[last], bytes(len(files[last]))
    monkeypatch.setattr(disk, "sync_file", slowly(disk.sync_file))  # or the shards would be there in any case
    with pytest.raises(ShardError, match="is no good image"):
        pack(source, tmp_path / "cut", PackOptions(shard_size=4))
    files[last] = good
    assert pack(source, tmp_path / "cut", PackOptions(shard_size=4)).num_shards_kept == 2
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def slowly(work: Callable[..., None]) -> Callable[..., None]:
    def after_a_while(*arguments: object) -> None:
        time.sleep(0.2)
        work(*arguments)

    return after_a_while


@pytest.mark.parametrize("torn", [1, 40])
def test_a_torn_journal_line_costs_one_shard_only(
    source_tree: Path, whole: dict[str, str], tmp_path: Path, torn: int
) -> None:
    run(source_tree, tmp_path, "SIGKILL", "os.replace", 8, "after")
    journal = tmp_path / "train/pack.journal"
    journal.write_bytes(journal.read_bytes()[:-torn])
    assert "continued behind 2 complete shards" in run(source_tree, tmp_path).stdout
    assert hashes(tmp_path) == whole


def test_an_unfinished_pack_refuses_other_options_until_told_to_overwrite(source_tree: Path, tmp_path: Path) -> None:
    run(source_tree, tmp_path, "SIGKILL", "os.replace", 8, "after")
    source = imagefolder.open_source(source_tree, "train")
    with pytest.raises(ShardError, match="unfinished pack of other files or options"):
        pack(source, tmp_path, PackOptions(shard_size=5, on_bad="quarantine"))
    with pytest.raises(ShardError, match="unfinished pack of other files or options"):
        pack(source, tmp_path, PackOptions(shard_size=4, on_bad="keep"))
    assert pack(source, tmp_path, PackOptions(shard_size=5, on_bad="quarantine", overwrite=True)).num_shards_kept == 0


def test_ctrl_c_says_how_to_continue_and_leaves_a_resumable_state(
    source_tree: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    done = run(source_tree, tmp_path, "SIGINT", "os.replace", 5, "after", workers=2)
    assert done.returncode == 130
    assert done.stderr.startswith("error: interrupted with ")
    assert "the same command continues" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.partial"))
    assert run(source_tree, tmp_path).returncode == 0
    assert hashes(tmp_path) == whole


@pytest.mark.fault(
    "a full disk while packing",
    "it ends, keeps the complete shards, and goes on from them when there is room",
    exit_code=4,
)
def test_a_full_disk_ends_with_exit_code_4_and_keeps_the_complete_shards(tmp_path: Path, record_property) -> None:
    src = plant(tmp_path / "src", {f"{i}.jpg": jpeg(i, (200, 200)) for i in range(40)})
    plant(src, {f"big{i}.jpg": jpeg(i) + bytes(400_000) for i in range(1)})
    limit = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from shard_tools.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words: list[Any] = ["pack", "files", src, tmp_path / "dst", "--shard-size", "4", "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", limit, *words], capture_output=True, text=True, env=ENV)
    assert done.returncode == 4
    assert done.stderr.startswith("error: no space left for ")
    assert "run the same command again" in done.stderr
    shards = list((tmp_path / "dst/train").glob("*.tar"))
    assert shards
    assert not list((tmp_path / "dst").rglob("*.partial"))
    again = subprocess.run([sys.executable, "-m", "shard_tools", *words], capture_output=True, text=True, env=ENV)
    assert f"continued behind {len(shards)} complete shard" in again.stdout
    record_property("seen", f"{len(shards)} shards kept")


def test_a_pack_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    with (tmp_path / "src/huge.jpg").open("wb") as file:
        file.truncate(2 * shutil.disk_usage(tmp_path).free)
    done = subprocess.run(
        [sys.executable, "-m", "shard_tools", "pack", "files", tmp_path / "src", tmp_path / "dst"],
        capture_output=True,
        text=True,
        env=ENV,
    )
    assert done.returncode == 4
    assert "GB free; make room" in done.stderr


@pytest.mark.fault("two packs into one folder at a time", "the second ends, the first is whole", exit_code=5)
def test_a_second_pack_into_the_same_split_is_refused(source_tree: Path, whole: dict[str, str], tmp_path: Path) -> None:
    first = struck.start(words_of(source_tree, tmp_path), "os.fsync", 5, "before", "SIGSTOP")
    _until_stopped(first.pid)
    try:
        second = run(source_tree, tmp_path)
        assert second.returncode == 5
        assert "another process is writing to" in second.stderr
    finally:
        os.kill(first.pid, signal.SIGCONT)
        first.join()
    assert first.exitcode == 0
    assert hashes(tmp_path) == whole


def _until_stopped(pid: int) -> None:
    """It is the fork server's child, so /proc tells and not waitid."""
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.02)
