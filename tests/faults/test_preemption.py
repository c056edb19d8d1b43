"""A signal, to one rank or to torchrun's agent, at any moment: saved, soon, and run_state.json says to go on."""

import os
import random
import signal
import time

import pytest

from fastssl import checkpoint, run_state
from shard_tools import exit_codes
from tests.fastssl.runs import assert_same_state, settings
from tests.faults.failing_runs import MONITORED, collect, fault, run_failing
from tests.faults.lives import Watch, start_torchrun, until
from tests.faults.record import times

pytestmark = pytest.mark.dist
MOMENTS = (("loop", "peer"), ("evaluation", "self"), ("save", "twice"), ("loop", "self"), ("evaluation", "peer"))
NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def assert_saved(failed):
    """All that was done is saved, and a scheduler is told to go on."""
    assert failed.slowest_s < 10
    assert failed.saved == failed.done > 0
    assert (failed.state.state, failed.state.action, failed.state.exit_code) == ("stopped", "requeue", 75)


@pytest.mark.fault(
    "SIGTERM, SIGUSR1 or Ctrl-C to one rank of two: in a step, blocked in a collective, in an evaluation or a save",
    "both ranks save the last step that is done and end within 10 s; the rest follows to the bit",
    exit_code=75,
)
def test_a_signal_to_one_rank_saves_and_stops_all(monitored_shards, tmp_path, fork_server, record_property):
    rng, count, slowest = random.Random(3), times(3, 50), 0.0
    more = (*MONITORED, "run.save_every=4steps")
    whole = fork_server.start("fastssl.train", settings(monitored_shards, tmp_path / "whole", *more), ranks=2)
    for i in range(count):
        (stage, to), number = MOMENTS[i % len(MOMENTS)], NUMBERS[i % len(NUMBERS)]
        stopped = run_failing(
            fork_server, monitored_shards, tmp_path / str(i), stage, "signal", "run.save_every=4steps",
            number=number, to=to, step=rng.randrange(1, 10),
        )  # fmt: skip
        assert stopped.code == exit_codes.STOPPED, stopped.said
        assert stopped.said.count("saved; the same command goes on from there") == 1
        left_out = stopped.said.count("the evaluation after step 6 is left out")
        assert left_out == 1 if stage == "evaluation" else left_out <= (stopped.done == 6)
        assert_saved(stopped)
        slowest = max(slowest, stopped.slowest_s)
        if i == 0:
            assert whole.finish() == 0, whole.err
        rest = settings(monitored_shards, stopped.folder / "run", *more)
        rest_of_it = fork_server.start("fastssl.train", rest, ranks=2)
        assert rest_of_it.finish() == 0, rest_of_it.err
        assert_same_state(stopped.folder / "run", tmp_path / "whole")
        assert run_state.read(stopped.folder / "run").state == "done"
    record_property("seen", f"{count} of {count}, the slowest after {slowest:.1f} s")


@pytest.mark.fault("a signal before the first step, to one rank", "both ranks end, nothing has changed", exit_code=75)
def test_a_signal_while_starting_changes_nothing(monitored_shards, tmp_path, fork_server, record_property):
    run = settings(monitored_shards, tmp_path / "run", *MONITORED)
    half = fork_server.start("fastssl.train", [*run, "run.stop_after=4steps"], ranks=2)
    assert half.finish() == 0, half.err
    before = checkpoint.newest(tmp_path / "run")
    stopped = run_failing(fork_server, monitored_shards, tmp_path, "start", "signal", number=signal.SIGTERM)
    assert stopped.codes == {0: exit_codes.STOPPED, 1: exit_codes.STOPPED}, stopped.said
    assert stopped.said.count("stopped before the first step") == 1, stopped.said
    assert stopped.slowest_s < 10
    assert checkpoint.newest(tmp_path / "run") == before
    assert (stopped.state.state, stopped.state.action, stopped.state.step) == ("stopped", "requeue", 4)
    record_property("seen", f"after {stopped.slowest_s:.1f} s")


@pytest.mark.fault("a second signal, to a process that is blocked in C", "ends at once; saved is what was")
def test_a_second_signal_ends_at_once(tiny_shards, tmp_path, fork_server, record_property):
    environment = fault(tmp_path, "loop", "block", rank=0, step=5)
    arguments = settings(tiny_shards, tmp_path / "run", "run.duration=100steps")
    life = fork_server.start("tests.faults.failing_job", arguments, environment=environment)
    until((tmp_path / "fault").exists)
    os.kill(life.pid, signal.SIGTERM)
    assert life.wait(1.5) is None
    os.kill(life.pid, signal.SIGTERM)
    began = time.monotonic()
    assert life.finish(5) == 128 + signal.SIGTERM
    assert checkpoint.newest(tmp_path / "run").name == "step-00000004"
    record_property("seen", f"after {time.monotonic() - began:.1f} s")


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR1])
@pytest.mark.fault(
    "SIGTERM to torchrun's agent, which hands it on, or SIGUSR1, of which the agent dies",
    "the ranks save the last step that is done and end within 10 s",
    exit_code=75,
)
def test_a_signal_to_the_agent_saves_and_stops_all(monitored_shards, tmp_path, number, record_property):
    rng, endless = random.Random(4), ("knn.every=6steps", "knn.k=5", "run.save_every=4steps", "run.duration=500steps")
    for i in range(times(1, 10)):
        folder, (stage, _) = tmp_path / str(i), MOMENTS[i % len(MOMENTS)]
        folder.mkdir()
        life = start_torchrun(
            "tests.faults.failing_job", settings(monitored_shards, folder / "run", *endless),
            Watch(chain=str(folder / "chain")), folder=folder,
            environment=fault(folder, stage, "signal", number=number, to="agent", step=rng.randrange(1, 10)),
        )  # fmt: skip
        assert life.finish() in (1, -number), life.err
        until(lambda: not life.processes())  # noqa: B023, called before the next turn
        stopped = collect(folder, exit_codes.STOPPED, life.err)
        assert_saved(stopped)
        record_property("seen", f"{signal.Signals(number).name} in {stage}: {stopped.slowest_s:.1f} s")
