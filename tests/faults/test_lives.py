"""The killing itself: a killed job leaves no process, and a job out of the fork server is a job of its own."""

import signal

import pytest

from tests.fastssl.runs import assert_same_state, finish, settings, start
from tests.faults.lives import Watch, chain, start_torchrun, until


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_job_leaves_no_process(tiny_shards, tmp_path, fork_server, ranks):
    endless = settings(tiny_shards, tmp_path / "run", "run.duration=100000steps", "run.save_every=never")
    life = fork_server.start("fastssl.train", endless, Watch(chain=str(tmp_path)), ranks=ranks)
    until(lambda: chain(tmp_path))
    assert len(life.processes()) == (1 if ranks == 1 else 3)
    life.kill()
    assert life.wait() == -signal.SIGKILL
    assert not life.processes()


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_torchrun_leaves_no_process(tiny_shards, tmp_path):
    endless = settings(tiny_shards, tmp_path / "run", "run.duration=100000steps", "run.save_every=never")
    life = start_torchrun("fastssl.train", endless, Watch(chain=str(tmp_path)), folder=tmp_path / "out")
    until(lambda: chain(tmp_path, rank=1))
    assert len(life.workers) == 2
    life.kill()
    assert life.wait() == -signal.SIGKILL
    assert not life.processes()


@pytest.mark.slow
def test_a_forked_job_is_to_the_bit_one_of_a_fresh_process(tiny_shards, tmp_path, fork_server):
    assert fork_server.start("fastssl.train", settings(tiny_shards, tmp_path / "forked")).finish() == 0
    code, _, err = finish(start("fastssl.train", settings(tiny_shards, tmp_path / "fresh")))
    assert code == 0, err
    assert_same_state(tmp_path / "forked", tmp_path / "fresh")


@pytest.mark.parametrize(("point", "steps"), [("batch:3", 4), ("fsync:5", 2), ("rename:1", 0)])
def test_a_job_dies_where_it_is_told_to(tiny_shards, tmp_path, fork_server, point, steps):
    life = fork_server.start("fastssl.train", settings(tiny_shards, tmp_path), Watch(chain=str(tmp_path), die=point))
    assert life.finish() == -signal.SIGKILL
    assert [line["step"] for line in chain(tmp_path)] == list(range(steps))
