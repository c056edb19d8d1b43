"""When one rank fails, stands still or dies, all end soon, one says why, and the run can go on."""

import os
import random
import signal
import time

import pytest

from shard_tools import exit_codes
from tests.fastssl.runs import assert_same_state, settings
from tests.faults.failing_job import CAUSE
from tests.faults.failing_runs import MONITORED, collect, fault, run_failing
from tests.faults.lives import Watch, chain, start_torchrun, until
from tests.faults.record import times

pytestmark = pytest.mark.dist
STAGES = ("start", "loop", "save", "evaluation", "teardown")


@pytest.mark.fault(
    "an exception on one rank: starting, in a step, a save or an evaluation, at the end",
    "all ranks end within 10 s, the rank and the cause are printed once",
)
def test_an_exception_on_one_rank_ends_all(monitored_shards, tmp_path, fork_server, record_property):
    rng, slowest, count = random.Random(5), 0.0, times(4, 50)
    for i in range(count):
        stage, kind = STAGES[i % len(STAGES)], ("ValueError", "RuntimeError")[(i + i // len(STAGES)) % 2]
        step = 2 if count == 4 else rng.randrange(12)
        failed = run_failing(fork_server, monitored_shards, tmp_path / str(i), stage, kind, step=step)
        cause = exit_codes.BAD_INPUT if kind == "ValueError" else exit_codes.BUG
        assert failed.code == failed.codes[1] == cause, failed.said
        if stage != "teardown":  # where rank 0 has nothing left to do
            assert failed.codes[0] == exit_codes.PEER_FAILED
            assert failed.said.count("rank 1") == 1, failed.said
        assert failed.slowest_s < 10
        assert len([line for line in failed.said.splitlines() if line.endswith(CAUSE)]) == 1, failed.said
        assert failed.said.count("Traceback") == (kind == "RuntimeError"), failed.said
        assert "gloo" not in failed.said
        if stage == "start":
            assert not (failed.folder / "run" / "run_state.json").exists()
        elif stage != "teardown":
            assert (failed.state.state, failed.state.action, failed.state.exit_code) == ("failed", "mend", cause)
            assert CAUSE in failed.state.reason
            assert failed.saved <= failed.done
        slowest = max(slowest, failed.slowest_s)
    record_property("seen", f"{count} of {count}, the slowest after {slowest:.1f} s")


@pytest.mark.fault(
    "one rank of two sleeps, in a step or in a save",
    "run.timeout_s later both ranks print the stacks of all threads, one says which rank stands where, and all end",
    exit_code=6,
)
def test_a_sleeping_rank_ends_all_with_stacks(monitored_shards, tmp_path, fork_server, record_property):
    count = times(1, 10)
    for i in range(count):
        stage = ("loop", "save")[i % 2]
        failed = run_failing(
            fork_server, monitored_shards, tmp_path / str(i), stage, "sleep", "run.timeout_s=3", "run.save_every=3steps"
        )
        assert failed.codes == {0: exit_codes.HANG, 1: exit_codes.HANG}
        assert [failed.said.count(f"stacks of rank {rank} ") for rank in (0, 1)] == [1, 1], failed.said
        assert failed.said.count("no progress for 3 s (run.timeout_s): rank 1 stands at") == 1, failed.said
        assert "failing_job.py" in failed.said
        assert 3 < failed.slowest_s < 3 + 5 or stage == "save"  # before the first step it takes longer
        assert (failed.state.state, failed.state.action, failed.state.exit_code) == ("failed", "requeue", 6)
    record_property("seen", f"{count} of {count}, {failed.slowest_s - 3:.1f} s after the timeout")


@pytest.mark.fault(
    "SIGSTOP to one rank of two",
    "run.timeout_s later the other one says that it does not answer, with its own stacks, and ends; woken, it ends too",
    exit_code=6,
)
def test_a_stopped_rank_is_reported_by_the_others(monitored_shards, tmp_path, fork_server, record_property):
    arguments = settings(monitored_shards, tmp_path / "run", *MONITORED, "run.timeout_s=3")
    environment = fault(tmp_path, "loop", "stop")
    life = fork_server.start("tests.faults.failing_job", arguments, ranks=2, environment=environment)
    until((tmp_path / "exit-0").exists)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGCONT)
    failed = collect(tmp_path, life.finish(30), life.err)
    assert failed.codes[0] == exit_codes.HANG
    assert 3 < failed.seconds[0] < 3 + 5
    assert "no progress for 3 s (run.timeout_s): rank 1 did not answer" in failed.said, failed.said
    assert "stacks of rank 0 " in failed.said
    assert failed.codes[1] != 0
    assert (failed.state.state, failed.state.action, failed.state.exit_code) == ("failed", "requeue", 6)
    record_property("seen", f"{failed.seconds[0] - 3:.1f} s after the timeout")


@pytest.mark.fault(
    "SIGKILL of a random rank at a random step, under torchrun --max-restarts",
    "torchrun starts the ranks again, and the end is to the bit that of a run without",
)
def test_torchrun_recovers_from_a_killed_rank(tiny_shards, tmp_path, fork_server, record_property, request):
    """Two kills a job, or one."""
    steps, rng, taken, jobs = 60, random.Random(8), [], times(1, 10)
    moments = ((3, 25), (26, 50))[: times(1, 2)]
    more = (f"run.duration={steps}steps", "run.save_every=5steps")
    whole = fork_server.start("fastssl.train", settings(tiny_shards, tmp_path / "whole", *more), ranks=2)
    for i in range(jobs):
        folder = tmp_path / str(i)
        watch, restarts = Watch(chain=str(folder)), ["--standalone", "--max-restarts=3"]
        life = start_torchrun(
            "fastssl.train", settings(tiny_shards, folder / "run", *more), watch, folder=folder, more=restarts
        )
        request.addfinalizer(life.kill)
        for low, high in moments:
            until(has_batches, folder, rng.randrange(low, high))
            workers, killed = life.workers, time.monotonic()
            os.kill(workers[rng.randrange(2)], signal.SIGKILL)
            until(are_others, life, workers)
            until(has_batches, folder, len(chain(folder, rank=1)) + 2)
            taken.append(time.monotonic() - killed)
        assert life.finish() == 0, life.err
        if i == 0:
            assert whole.finish() == 0, whole.err
        assert_same_state(folder / "run", tmp_path / "whole")
    seen = f"{len(taken)} of {len(taken)}, training again after {min(taken):.0f} to {max(taken):.0f} s"
    record_property("seen", seen)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [(["data.root=/nowhere"], "/nowhere"), (["run.batch_size=7"], "which 2 ranks cannot share"), (["run.seed=x"], "x")],
)
@pytest.mark.fault("a wrong setting, or missing shards, on all ranks", "rank 0 says so, once", exit_code=2)
def test_what_all_ranks_find_is_said_once(tiny_shards, tmp_path, fork_server, more, sentence):
    life = fork_server.start("fastssl.train", settings(tiny_shards, tmp_path / "run", *more), ranks=2)
    assert life.finish(30) == exit_codes.BAD_INPUT
    assert life.err.startswith("error: ")
    assert sentence in life.err
    assert life.err.count("\n") == 1, life.err
    assert not (tmp_path / "run").exists()


def has_batches(folder, count):
    return len(chain(folder, rank=1)) >= count


def are_others(life, workers):
    return len(life.workers) == 2 and not set(life.workers) & set(workers)
