"""Checkpoints under kills, damage and full disks: the newest whole one is found, and nothing else is used."""

import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time

import pytest
import torch

from fastssl import checkpoint, checkpoint_files, export, run_lock
from fastssl.checkpoint import DamagedError
from fastssl.evaluate import main as evaluate
from shard_tools import exit_codes
from tests.fastssl.runs import assert_same_state, settings
from tests.faults import saves
from tests.faults.record import times

FILES = ("model.pt", "training.pt", "rank-0.pt", "meta.json", "SHA256SUMS")


def whole(run):
    """Steps of the checkpoints under their final names whose hashes agree, the newest first."""
    folders = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    return [int(folder.name.removeprefix("step-")) for folder in folders if checkpoint.check(folder) is None]


def leftovers(run):
    return sorted(path.name for path in (run / "checkpoints").glob(".*"))


# Kills


@pytest.mark.fault(
    "SIGKILL at a random moment of a save", "the newest whole checkpoint is found, at most one interval is lost"
)
@pytest.mark.parametrize("steps", ["1000000", "5 x 1000000"], ids=["the next step", "the same step again"])
def test_a_kill_in_a_save_loses_nothing_that_was_saved(fork_server, tmp_path, record_property, steps):
    kills, rng, where = times(6, 100), random.Random(3), []
    for _ in range(kills):
        life = fork_server.start("tests.faults.saves", ["save", str(tmp_path), steps])
        before = saves.said(tmp_path, "saved")
        _wait_for(lambda before=before: saves.said(tmp_path, "saved") >= before + 3, life)
        time.sleep(rng.uniform(0, 0.08))  # a save takes some 20 ms
        life.kill()
        where.append(_moment(tmp_path))
        saved, begun = saves.said(tmp_path, "saved"), saves.said(tmp_path, "begun")
        found = checkpoint.newest(tmp_path)
        assert saves.content(found) in {saved, begun}, life.err
        assert begun - saved <= 1
        assert all(checkpoint.check(folder) is None for folder in (tmp_path / "checkpoints").glob("step-*"))
        assert steps.startswith("5") or len(whole(tmp_path)) >= 2
    last = saves.said(tmp_path, "begun") + 2
    end = fork_server.start("tests.faults.saves", ["save", str(tmp_path), steps.replace("1000000", str(last))])
    assert end.finish() == 0, end.err
    assert saves.content(checkpoint.newest(tmp_path)) == last
    assert [name for name in leftovers(tmp_path) if "replaced" not in name] == []
    counts = ", ".join(f"{where.count(moment)} {moment}" for moment in dict.fromkeys(sorted(where)))
    record_property("seen", f"{kills} of {kills} found ({counts})")


def _moment(run):
    """Where a save was when it was killed, as far as the folder tells."""
    names = {path.name.partition("-")[0]: path for path in (run / "checkpoints").glob(".*")}
    if ".deleting" in names:
        return "while an old one was deleted"
    if ".writing" in names:
        return "before its rename" if (names[".writing"] / "SHA256SUMS").is_file() else "while it was written"
    if ".LAST" in names:
        return "before LAST moved"
    return "between two saves"


def _wait_for(condition, life, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert life.wait(0.002) is None, life.err
        assert time.monotonic() < until, life.err


@pytest.mark.fault(
    "SIGKILL before each system call of a save that changes the disk", "a whole checkpoint is found, two are kept"
)
@pytest.mark.parametrize("there", ["nothing", "a damaged one", "a whole one"])
def test_a_kill_at_any_system_call_leaves_a_whole_checkpoint(fork_server, tmp_path, record_property, there):
    """Of a save of step 3, with steps 1 and 2 before it, and what an earlier life may have left of step 3."""
    ready = tmp_path / "ready"
    assert fork_server.start("tests.faults.saves", ["save", str(ready), "3", "3"]).finish() == 0
    if there == "nothing":
        shutil.rmtree(ready / "checkpoints" / "step-00000003")
    if there == "a damaged one":
        flip(ready / "checkpoints" / "step-00000003" / "training.pt", 12345)
    (ready / "said").unlink()
    steps, least = ("3 x 4", 3) if there == "a whole one" else ("3", 2)
    killed, first = 0, 1 + 2 * ("nothing", "a damaged one", "a whole one").index(there)
    for call in itertools.count(times(first, 1), times(5, 1)):
        run = tmp_path / f"killed-{call}"
        shutil.copytree(ready, run)
        life = fork_server.start("tests.faults.saves", ["save", str(run), steps, "2", str(call)])
        code = life.finish()
        number = saves.content(checkpoint.newest(run))
        assert number >= max(least, saves.said(run, "saved"))
        assert len(whole(run)) + sum(checkpoint.check(f) is None for f in run.glob("checkpoints/.replaced-*")) >= 2
        broken = {folder.name for folder in run.glob("checkpoints/step-*") if checkpoint.check(folder)}
        assert broken <= ({"step-00000003"} if there == "a damaged one" else set())
        if code == 0:
            break
        assert code == -signal.SIGKILL, life.err
        again = fork_server.start("tests.faults.saves", ["save", str(run), str(number + 2)])
        assert again.finish() == 0, again.err
        assert leftovers(run) == []
        assert whole(run) == [number + 2, number + 1]
        shutil.rmtree(run)
        killed += 1
    assert number == (4 if there == "a whole one" else 3)
    assert killed >= times(3, 15)
    record_property("seen", f"{killed} of {killed} calls")


@pytest.mark.fault("SIGKILL of both ranks in a save", "the newest whole checkpoint is found, with both ranks' files")
@pytest.mark.dist
def test_a_kill_of_two_ranks_in_a_save_loses_nothing_that_was_saved(fork_server, tmp_path, record_property):
    kills, rng = times(3, 40), random.Random(4)
    for _ in range(kills):
        life = fork_server.start("tests.faults.saves", ["save", str(tmp_path), "1000000"], ranks=2)
        before = saves.said(tmp_path, "saved")
        _wait_for(lambda before=before: saves.said(tmp_path, "saved") >= before + 2, life)
        time.sleep(rng.uniform(0, 0.08))
        life.kill()
        found = checkpoint.newest(tmp_path)
        assert saves.content(found) in {saves.said(tmp_path, "saved"), saves.said(tmp_path, "begun")}
        assert len(checkpoint.load_rank_states(found)) == 2
        assert len(whole(tmp_path)) >= 2
    record_property("seen", f"{kills} of {kills} found")


@pytest.mark.fault("a power cut at any moment of a save", "nothing has its name before its bytes are on the disk")
@pytest.mark.dist
def test_every_file_is_synced_before_the_rename_and_the_folder_after_it(fork_server, tmp_path):
    """Every rank's calls, in their order in time: fsync of each file, whole; of the folder; rename; fsync again."""
    record = tmp_path / "calls"
    job = ["save", str(tmp_path / "run"), "3", "2", "", str(record)]
    assert (life := fork_server.start("tests.faults.saves", job, ranks=2)).finish() == 0, life.err
    root = tmp_path / "run" / "checkpoints"
    calls = sorted(map(json.loads, record.read_text().splitlines()), key=lambda call: call["at"])
    names = ["model.pt", "training.pt", "meta.json", "SHA256SUMS", "rank-0.pt", "rank-1.pt"]
    for step in (2, 3):  # of the third, the first is deleted as well
        beside, final = root / f".writing-step-{step:08d}", root / f"step-{step:08d}"
        renamed = _position(calls, "rename", beside, final)
        synced = {name: _position(calls, "fsync", beside / name) for name in names}
        for name, position in synced.items():
            assert calls[position]["size"] == (final / name).stat().st_size > 0
        assert max(synced.values()) < _position(calls, "fsync", beside) < renamed
        last = _position(calls, "replace", root / ".LAST", root / "LAST", renamed)
        assert _position(calls, "fsync", root / ".LAST", None, synced["SHA256SUMS"]) < last
        durable = _position(calls, "fsync", root, None, last)
        if step == 3:
            assert durable < _position(calls, "rename", root / "step-00000001", root / ".deleting-step-00000001")
    first = _position(calls, "fsync", tmp_path / "run")
    assert _position(calls, "fsync", tmp_path) > first  # the run's own name, too
    assert {call["rank"] for call in calls if call["call"] == "fsync" and call["path"].endswith("rank-1.pt")} == {1}


def _position(calls, name, path, to=None, after=-1):
    """Of the first such call after another one; there must be one."""
    return next(
        i for i, c in enumerate(calls)
        if i > after and (c["call"], c["path"], c["to"]) == (name, str(path), str(to) if to else None)
    )  # fmt: skip


# Damage


def flip(path, bit):
    """In place: done twice, the file is what it was."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ (1 << bit % 8)]))


@pytest.fixture(scope="module")
def two_saves(fork_server, tmp_path_factory):
    """A run with the whole checkpoints 1 and 2."""
    run = tmp_path_factory.mktemp("saves") / "run"
    life = fork_server.start("tests.faults.saves", ["save", str(run), "2"])
    assert life.finish() == 0, life.err
    return run


@pytest.fixture
def saved(two_saves, tmp_path):
    """A copy of it to damage: (run, older folder, newer folder)."""
    run = shutil.copytree(two_saves, tmp_path / "run")
    return run, run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000002"


def assert_the_one_before_is_taken(run, older, newer):
    fault = checkpoint.check(newer)
    assert fault is not None
    assert checkpoint.newest(run) == checkpoint.find(run) == older
    with pytest.raises(DamagedError) as refused:
        checkpoint.find(newer)
    assert refused.value.exit_code == exit_codes.DAMAGED
    assert str(refused.value) == f"checkpoint {newer} is damaged: {fault}; take another one of the same run"
    assert "\n" not in fault


@pytest.mark.fault(
    "one bit of a checkpoint flipped", "found before a tensor is used, the one before is taken", exit_code=7
)
def test_every_flipped_bit_is_found_and_the_one_before_is_taken(saved, record_property, capsys):
    flips, rng = times(150, 1000), random.Random(0)
    run, _, newer = saved
    for number in range(flips):
        victim = newer / FILES[number % len(FILES)]
        bit = rng.randrange(victim.stat().st_size * 8)
        flip(victim, bit)
        assert_the_one_before_is_taken(*saved)
        assert f"warning: checkpoint {newer} is passed over: " in capsys.readouterr().err
        for name, device in (("model.pt", "cpu"), ("training.pt", "cpu"), ("rank-0.pt", "cpu")):
            if victim.name in (name, "SHA256SUMS"):
                try:
                    checkpoint_files.read_tensors(newer, name, torch.device(device))
                except DamagedError:
                    continue
                assert victim.name == "SHA256SUMS"  # whose broken line is another file's
        flip(victim, bit)
    assert checkpoint.newest(run) == newer
    record_property("seen", f"{flips} of {flips} found")


@pytest.mark.fault("any one bit of a checkpoint's SHA256SUMS flipped", "found, the one before is taken", exit_code=7)
def test_every_bit_of_the_hashes_counts(saved, record_property):
    _, _, newer = saved
    sums = newer / "SHA256SUMS"
    num_bits = sums.stat().st_size * 8
    for bit in range(num_bits):
        flip(sums, bit)
        assert checkpoint.check(newer) is not None, bit
        flip(sums, bit)
    assert checkpoint.check(newer) is None
    record_property("seen", f"{num_bits:,} of {num_bits:,} found")


@pytest.mark.fault("a file of a checkpoint cut", "found before a tensor is used, the one before is taken", exit_code=7)
def test_every_cut_file_is_found_and_the_one_before_is_taken(saved, record_property):
    cuts, rng = times(30, 100), random.Random(1)
    for number in range(cuts):
        victim = saved[2] / FILES[number % len(FILES)]
        content = victim.read_bytes()
        size = len(content)
        victim.write_bytes(content[: rng.choice([0, 1, size // 2, size - 1, rng.randrange(size)])])
        assert_the_one_before_is_taken(*saved)
        victim.write_bytes(content)
    record_property("seen", f"{cuts} of {cuts} found")


@pytest.mark.fault("LAST flipped, cut, a folder, or gone", "the newest whole checkpoint is found: nothing reads LAST")
def test_nothing_depends_on_last(saved):
    run, _, newer = saved
    last = run / "checkpoints" / "LAST"
    for bit in range(last.stat().st_size * 8):
        flip(last, bit)
        assert checkpoint.newest(run) == newer
    for damage in (lambda: last.write_bytes(b""), last.unlink, last.mkdir):
        damage()
        assert checkpoint.newest(run) == newer


def _sealed(folder):
    """Hashes that agree again, as of someone who changed a file on purpose."""
    checkpoint_files.seal(folder, {path.name for path in folder.iterdir()} - {"SHA256SUMS"})


def _meta(folder, **changed):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, **changed}))
    _sealed(folder)


def _instead(make):
    def damage(folder):
        (folder / "training.pt").rename(folder.parent / "elsewhere")
        make(folder / "training.pt", folder.parent / "elsewhere")

    return damage


def _text(name, content):
    def damage(folder):
        (folder / name).write_bytes(content)
        if name != "SHA256SUMS":
            _sealed(folder)

    return damage


ODD = {
    "an empty folder": lambda f: [path.unlink() for path in f.iterdir()],
    "a file in place of the folder": lambda f: (shutil.rmtree(f), f.write_text("x")),
    "a missing rank file": lambda f: (f / "rank-0.pt").unlink(),
    "a rank file that the hashes do not list": lambda f: ((f / "rank-0.pt").unlink(), _sealed(f)),
    "a rank too many": lambda f: (shutil.copy(f / "rank-0.pt", f / "rank-1.pt"), _sealed(f)),
    "a file that the hashes list and nobody knows": lambda f: ((f / "more.pt").write_bytes(b"x"), _sealed(f)),
    "another step's name": lambda f: _meta(f, step=7),
    "a link": _instead(lambda new, old: new.symlink_to(old)),
    "a link to nothing": _instead(lambda new, old: new.symlink_to("nowhere")),
    "a link to itself": _instead(lambda new, old: new.symlink_to(new.name)),
    "a folder in place of a file": _instead(lambda new, old: new.mkdir()),
    "a pipe in place of a file": _instead(lambda new, old: os.mkfifo(new)),
    "a folder in place of the hashes": lambda f: ((f / "SHA256SUMS").unlink(), (f / "SHA256SUMS").mkdir()),
    "hashes of 1 TB": lambda f: os.truncate(f / "SHA256SUMS", 1 << 40),
    "a meta.json of 1 TB": lambda f: os.truncate(f / "meta.json", 1 << 40),
    "empty hashes": _text("SHA256SUMS", b""),
    "hashes of paths elsewhere": _text("SHA256SUMS", b"0" * 64 + b"  ../../../etc/passwd\n"),
    "hashes that are no text": _text("SHA256SUMS", bytes(range(256))),
    "a meta.json that is no JSON": _text("meta.json", b"{"),
    "a meta.json that is a list": _text("meta.json", b"[]"),
    "a meta.json 100,000 deep": _text("meta.json", b"[" * 100_000),
    "a number of 100,000 digits": _text("meta.json", b'{"format": 1, "step": ' + b"9" * 100_000 + b"}"),
    "a meta.json without a step": lambda f: _meta(f, step=None),
    "a step that is true": lambda f: _meta(f, step=True),
    "no ranks": lambda f: _meta(f, world=0),
    "more ranks than there can be": lambda f: _meta(f, world=10**12),
}  # fmt: skip


@pytest.mark.fault(
    "a checkpoint with links, folders or pipes for files, missing or foreign files, or lists of nonsense or 1 TB",
    "one sentence within a second, the one before is taken",
    exit_code=7,
)
def test_whatever_stands_in_a_checkpoints_place_is_answered_by_one_sentence(two_saves, tmp_path, record_property):
    for number, (name, damage) in enumerate(ODD.items()):
        run = shutil.copytree(two_saves, tmp_path / str(number))
        older, newer = (run / "checkpoints" / f"step-0000000{step}" for step in (1, 2))
        damage(newer)
        began = time.monotonic()
        assert checkpoint.check(newer) is not None, name
        assert checkpoint.newest(run) == older, name
        if newer.is_dir():
            assert_the_one_before_is_taken(run, older, newer)
        assert time.monotonic() - began < 1, name
    record_property("seen", f"{len(ODD)} kinds")


def test_files_that_nobody_listed_do_no_harm(saved):
    """A desktop's, an editor's, a file server's: they are not read."""
    run, _, newer = saved
    for name in (".DS_Store", ".nfs0001", "notes.txt"):
        (newer / name).write_text("x")
    assert checkpoint.newest(run) == newer


@pytest.mark.fault(
    "all checkpoints of a run damaged", "refused, instead of a silent start from the beginning", exit_code=7
)
def test_a_run_of_which_nothing_is_whole_does_not_begin_anew(saved):
    run, older, newer = saved
    for folder in (older, newer):
        flip(folder / "model.pt", 99)
    for look in (checkpoint.newest, checkpoint.find):
        with pytest.raises(
            DamagedError, match=r"no checkpoint in .* is whole \(step-00000002: model\.pt does not.*run\.dir"
        ):
            look(run)


# Retention


@pytest.mark.fault("damaged checkpoints when old ones are deleted", "deleted is only what is older than two whole ones")
def test_two_whole_checkpoints_are_left_whatever_is_damaged(fork_server, tmp_path):
    def save_to(step, keep=2):
        life = fork_server.start("tests.faults.saves", ["save", str(tmp_path), str(step), str(keep)])
        assert life.finish() == 0, life.err

    folders = tmp_path / "checkpoints"
    save_to(3, keep=3)
    for step in (2, 3):
        flip(folders / f"step-0000000{step}" / "model.pt", 7)
    save_to(2, keep=1)  # goes on from 1 and replaces what is damaged of 2; keep is not taken at its word
    assert whole(tmp_path) == [2, 1]
    save_to(4)
    assert whole(tmp_path) == [4, 3]
    assert leftovers(tmp_path) == []
    shutil.copytree(folders / "step-00000004", folders / "step-00000009")  # a name that lies, newer than all
    flip(folders / "step-00000004" / "rank-0.pt", 7)
    save_to(5)  # from 3, so that it is 4 and 5 that are saved
    assert whole(tmp_path)[:2] == [5, 4]


# Real runs


@pytest.fixture(scope="module")
def real(fork_server, tiny_shards, tmp_path_factory):
    """A run of 8 steps in one go, and one of which 4 are done, with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("real")
    for name, more in (("once", []), ("half", ["run.stop_after=4steps"])):
        life = fork_server.start("fastssl.train", run_settings(tiny_shards, folder / name, *more))
        assert life.finish() == 0, life.err
    return folder


def run_settings(shards, run, *more):
    return settings(shards, run, "run.duration=8steps", "data.split=train", *more)


@pytest.mark.fault(
    "one bit of a run's newest checkpoint flipped", "training, evaluation and export warn and take the one before"
)
def test_commands_take_the_checkpoint_before_a_damaged_one(fork_server, real, tiny_shards, tmp_path, capsys):
    run = shutil.copytree(real / "half", tmp_path / "run")
    newer = run / "checkpoints" / "step-00000004"
    flip(newer / "model.pt", 1_000_003)
    warning = f"warning: checkpoint {newer} is passed over: model.pt does not have the sha256 that SHA256SUMS says"
    assert export.main(["safetensors", str(run), str(tmp_path / "a.safetensors")]) == 0
    said = capsys.readouterr()
    assert warning in said.err
    assert "step 2" in said.out + said.err
    assert evaluate.main(knn(run, tiny_shards, tmp_path / "knn.json")) == 0
    assert warning in capsys.readouterr().err
    assert json.loads((tmp_path / "knn.json").read_text())["step"] == 2
    life = fork_server.start("fastssl.train", run_settings(tiny_shards, run))
    assert life.finish() == 0, life.err
    assert warning in life.err
    assert "resumed at step 2" in life.err
    assert_same_state(run, real / "once")


def knn(checkpoint_path, shards, out):
    return ["evaluator=knn", f"checkpoint={checkpoint_path}", f"data.root={shards}", f"data.test_root={shards}",
            "data.test_split=train", "run.device=cpu", "loader.threads=1", f"eval.out={out}"]  # fmt: skip


@pytest.mark.fault("a damaged checkpoint folder given by name", "evaluation and export refuse it", exit_code=7)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_folder_given_by_name_is_refused(real, tiny_shards, tmp_path, capsys, name):
    run = shutil.copytree(real / "half", tmp_path / "run")
    newer = run / "checkpoints" / "step-00000004"
    flip(newer / name, 407)
    for given in (newer, newer / "model.pt"):
        for command in (
            lambda given=given: export.main(["safetensors", str(given), str(tmp_path / "a.safetensors")]),
            lambda given=given: evaluate.main(knn(given, tiny_shards, tmp_path / "knn.json")),
        ):
            assert command() == exit_codes.DAMAGED
            said = capsys.readouterr().err
            assert said.startswith(f"error: checkpoint {newer} is damaged: ")
            assert said.endswith("; take another one of the same run\n")
            assert said.count("\n") == 1
    assert not (tmp_path / "a.safetensors").exists()


@pytest.mark.fault(
    "disk full while a checkpoint is saved", "the one before is kept and named, no half folder", exit_code=4
)
def test_a_full_disk_keeps_the_checkpoint_before(fork_server, real, tiny_shards, tmp_path, record_property):
    """A real one: a file system in memory, filled until a third checkpoint does not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        run = shutil.copytree(real / "half", disk / "run")
        size = sum(file.stat().st_size for file in (run / "checkpoints" / "step-00000004").iterdir())
        free = shutil.disk_usage(disk).free
        assert free > size
        (disk / "filler").write_bytes(bytes(free - size // 2))
        job = ["fastssl.train", run_settings(tiny_shards, run)]
        life = fork_server.start(*job)
        assert life.finish() == exit_codes.DISK_FULL, life.err
        assert_said_full(life.err, run, "the disk is full (No space left on device)", size)
        assert_only_the_ones_before(run)
        (disk / "filler").unlink()
        assert fork_server.start(*job).finish() == 0
        assert_same_state(run, real / "once")
        record_property("seen", f"{size:,} bytes into {size // 2:,}; then the same bits as if nothing had been")
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.fault(
    "a limit on file size met while saving", "the one before is kept and named, no half folder", exit_code=4
)
def test_a_limit_on_file_size_keeps_the_checkpoint_before(fork_server, real, tiny_shards, tmp_path):
    run = shutil.copytree(real / "half", tmp_path / "run")
    size = (run / "checkpoints" / "step-00000004" / "model.pt").stat().st_size
    job = [*run_settings(tiny_shards, run)]
    life = fork_server.start("tests.faults.saves", ["limit", "0", str(size // 2), "fastssl.train", *job])
    assert life.finish() == exit_codes.DISK_FULL, life.err
    assert_said_full(life.err, run, "a file would be larger than is allowed (File too large)", size)
    assert f"and ulimit -f allows {size // 2:,}" in life.err
    assert_only_the_ones_before(run)
    assert fork_server.start("fastssl.train", job).finish() == 0
    assert_same_state(run, real / "once")


def assert_said_full(err, run, why, least):
    root = run / "checkpoints"
    (line,) = [line for line in err.splitlines() if "error" in line]
    start, _, rest = line.partition("; it takes ")
    assert start.startswith(f"error: the checkpoint {root}/step-00000006/")
    assert start.endswith(f".pt cannot be written: {why}")
    assert int(rest.partition(" bytes")[0].replace(",", "")) > 0.8 * least
    assert f"{root}/step-00000004 is kept; make room and give the same command" in rest


def assert_only_the_ones_before(run):
    assert leftovers(run) == []
    assert whole(run) == [4, 2]
    assert len(list((run / "checkpoints").glob("step-*"))) == 2


@pytest.mark.fault("disk full on one rank of two", "both end, the checkpoint before is kept", exit_code=4)
@pytest.mark.dist
def test_a_full_disk_on_one_rank_ends_both(fork_server, tiny_shards, tmp_path):
    """Rank 1 may write 20 kB a file, and its queue alone has 51."""
    from tests.fastssl.test_swav import settings as swav_settings

    job = swav_settings(tiny_shards, tmp_path / "run", "method.queue_length=1600", "run.duration=8steps")
    life = fork_server.start("fastssl.train", [*job, "run.stop_after=4steps"], ranks=2)
    assert life.finish() == 0, life.err
    began = time.monotonic()
    life = fork_server.start("tests.faults.saves", ["limit", "1", "20000", "fastssl.train", *job], ranks=2)
    assert life.finish() in (exit_codes.DISK_FULL, exit_codes.PEER_FAILED), life.err  # rank 1's, or rank 0's
    assert time.monotonic() - began < 30
    (line,) = [line for line in life.err.splitlines() if "error" in line]
    assert line.startswith(
        f"error on rank 1: the checkpoint {tmp_path}/run/checkpoints/step-00000006/rank-1.pt cannot be"
    )
    assert f"{tmp_path}/run/checkpoints/step-00000004 is kept" in line
    assert_only_the_ones_before(tmp_path / "run")
    life = fork_server.start("fastssl.train", job, ranks=2)
    assert life.finish() == 0, life.err
    assert "resumed at step 4" in life.err


# Two jobs on one run


@pytest.mark.fault("two jobs with one run.dir", "the second refuses within seconds and says who has it", exit_code=5)
def test_a_second_job_on_a_run_refuses(fork_server, tiny_shards, tmp_path, record_property):
    run = tmp_path / "run"
    job = settings(tiny_shards, run, "run.duration=100000steps", "run.save_every=5steps")
    first = fork_server.start("fastssl.train", job)
    _wait_for(lambda: whole(run), first)
    began = time.monotonic()
    second = fork_server.start("fastssl.train", job)
    assert second.finish() == exit_codes.LOCKED, second.err
    took = time.monotonic() - began
    assert took < 15
    (line,) = second.err.strip().splitlines()[-1:]
    assert line.startswith(
        f"error: run.dir={run} is in use by process {first.pid} on host {socket.gethostname()!r} since 2"
    )
    assert line.endswith("; wait for its end, stop it, or give another run.dir")
    assert first.wait(0) is None
    assert export.main(["safetensors", str(run), str(tmp_path / "out.safetensors")]) == 0  # reading needs no lock
    first.kill()
    last = checkpoint.load_meta(checkpoint.find(run))["step"]
    third = fork_server.start("fastssl.train", [*job, f"run.stop_after={last + 5}steps"])
    assert third.finish() == 0, third.err
    assert f"resumed at step {last}" in third.err
    record_property("seen", f"{took:.1f} s")


@pytest.mark.fault("two jobs of two ranks with one run.dir", "both ranks of the second refuse", exit_code=5)
@pytest.mark.dist
def test_a_second_job_of_two_ranks_refuses(fork_server, tiny_shards, tmp_path):
    run = tmp_path / "run"
    with run_lock.held(run):
        life = fork_server.start("fastssl.train", settings(tiny_shards, run), ranks=2)
        assert life.finish() in (exit_codes.LOCKED, exit_codes.PEER_FAILED), life.err
    assert life.err.count(f"run.dir={run} is in use by process {os.getpid()} on host") == 1
    assert [path.name for path in run.iterdir()] == ["lock"]


def test_a_lock_that_says_nothing_still_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.0)
    with run_lock.held(tmp_path):
        for note in (b"", b"[]", b'{"pid": "x"}', b"\xff" * 5000):
            (tmp_path / "lock").write_bytes(note)
            with (
                pytest.raises(ValueError, match="is in use by a process that has not said who it is"),
                run_lock.held(tmp_path),
            ):
                pass
    with run_lock.held(tmp_path):
        pass


def test_a_run_that_cannot_be_written_is_answered_by_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "lock").symlink_to("elsewhere")
    for folder in (tmp_path / "file" / "run", tmp_path):
        with (
            pytest.raises(ValueError, match=r"run\.dir=.* cannot be written \(.*\); give another run\.dir"),
            run_lock.held(folder),
        ):
            pass
