"""run_state.json: what it says at each stage of a run's life, and that it never promises what is not there."""

import dataclasses
import json
import signal

import pytest

from fastssl import run_lock, run_state, train
from fastssl.run_state import RunState, StateKeeper
from fastssl.training import Training
from shard_tools import exit_codes
from tests.fastssl.runs import settings


@pytest.fixture
def keeper(tmp_path):
    keeper = StateKeeper(tmp_path)
    keeper.take()
    return keeper


@pytest.mark.parametrize(
    ("code", "state", "action"),
    [
        (exit_codes.STOPPED, "stopped", "requeue"),
        (exit_codes.INTERRUPTED, "stopped", "requeue"),
        (exit_codes.HANG, "failed", "requeue"),
        (exit_codes.PEER_FAILED, "failed", "requeue"),
        (exit_codes.BUG, "failed", "mend"),
        (exit_codes.BAD_INPUT, "failed", "mend"),
        (exit_codes.TOO_MANY_BAD, "failed", "mend"),
        (exit_codes.DISK_FULL, "failed", "mend"),
        (exit_codes.DAMAGED, "failed", "mend"),
        (exit_codes.NOT_FINITE, "failed", "mend"),
    ],
)
def test_the_exit_code_decides_what_a_scheduler_should_do(keeper, tmp_path, code, state, action):
    keeper.begin(0, of=12)
    keeper.saved(4)
    keeper.end(code, "why")
    found = run_state.read(tmp_path)
    assert (found.state, found.action, found.exit_code, found.reason) == (state, action, code, "why")
    assert (found.step, found.of, found.checkpoint) == (4, 12, "checkpoints/step-00000004")


def test_a_run_that_reached_its_end_is_done_and_one_cut_short_is_stopped(keeper, tmp_path):
    keeper.begin(0, of=12)
    keeper.saved(8)
    keeper.end(exit_codes.DONE)
    assert (run_state.read(tmp_path).state, run_state.read(tmp_path).action) == ("stopped", "none")
    keeper = StateKeeper(tmp_path)
    keeper.take()
    keeper.begin(8, of=12)
    keeper.saved(12)
    keeper.end(exit_codes.DONE)
    assert (run_state.read(tmp_path).state, run_state.read(tmp_path).action) == ("done", "none")


def test_the_first_end_counts(keeper, tmp_path):
    keeper.begin(0, of=12)
    keeper.end(exit_codes.HANG, "it stood still")
    keeper.end(exit_codes.PEER_FAILED, "connection closed")
    assert run_state.read(tmp_path).reason == "it stood still"


def test_a_start_that_fails_at_once_leaves_an_empty_place_empty(keeper, tmp_path):
    keeper.end(exit_codes.BAD_INPUT, "no shards")
    assert not list(tmp_path.iterdir())


def test_a_failure_before_the_first_step_is_added_to_what_was_reached(keeper, tmp_path):
    keeper.begin(0, of=12)
    keeper.saved(4)
    keeper.end(exit_codes.STOPPED)
    (tmp_path / run_lock.FILE).touch()
    StateKeeper(tmp_path).end(exit_codes.BAD_INPUT, "no shards")
    found = run_state.read(tmp_path)
    assert (found.state, found.action, found.step, found.reason) == ("failed", "mend", 4, "no shards")


def test_a_second_job_says_nothing_in_the_first_one_s_name(keeper, tmp_path):
    keeper.begin(0, of=12)
    with run_lock.held(tmp_path):
        StateKeeper(tmp_path).end(exit_codes.BAD_INPUT, "no shards")
    assert run_state.read(tmp_path).state == "running"


def test_what_is_done_stays_done(keeper, tmp_path):
    keeper.begin(0, of=4)
    keeper.saved(4)
    keeper.end(exit_codes.DONE)
    later = StateKeeper(tmp_path)
    later.take()
    later.end(exit_codes.BAD_INPUT, "other settings")
    assert run_state.read(tmp_path).state == "done"


def test_starts_that_gain_nothing_are_counted(tmp_path):
    for starts in (1, 2, 3):
        keeper = StateKeeper(tmp_path)
        keeper.begin(0, of=12)  # and is killed
        assert run_state.read(tmp_path).starts == starts
    keeper.saved(4)
    assert run_state.read(tmp_path).starts == 1
    StateKeeper(tmp_path).begin(4, of=12)
    assert run_state.read(tmp_path).starts == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": "running"}'])
def test_a_file_that_is_not_one_of_these_is_none(tmp_path, text):
    (tmp_path / run_state.FILE).write_text(text)
    assert run_state.read(tmp_path) is None


def test_only_rank_0_writes(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    StateKeeper(tmp_path).begin(0, of=12)
    assert not list(tmp_path.iterdir())


def test_a_run_says_where_it_is_from_its_start_to_its_end(tiny_shards, tmp_path, monkeypatch):
    seen, real = [], Training.step

    def step(self, views, at, lr):
        seen.append(run_state.read(tmp_path))
        return real(self, views, at, lr)

    monkeypatch.setattr(Training, "step", step)
    assert train.main(settings(tiny_shards, tmp_path, "run.duration=5steps")) == 0
    assert [(s.state, s.action, s.step, s.of, s.exit_code) for s in seen] == [
        ("running", "requeue", saved, 5, None) for saved in (0, 0, 2, 2, 4)
    ]
    assert [s.checkpoint for s in seen[1:3]] == [None, "checkpoints/step-00000002"]
    last = json.loads((tmp_path / run_state.FILE).read_text())
    assert last.keys() == {field.name for field in dataclasses.fields(RunState)}
    assert (last["state"], last["action"], last["step"], last["exit_code"]) == ("done", "none", 5, 0)


def test_a_signal_and_an_error_are_told_on_one_process_too(tiny_shards, tmp_path, monkeypatch):
    real = Training.step

    def step(self, views, at, lr):
        if at == 2:
            signal.raise_signal(signal.SIGUSR1)
        if at == 4:
            raise ValueError("the cause of it all")
        return real(self, views, at, lr)

    monkeypatch.setattr(Training, "step", step)
    assert train.main(settings(tiny_shards, tmp_path)) == exit_codes.STOPPED
    found = run_state.read(tmp_path)
    assert (found.state, found.action, found.step) == ("stopped", "requeue", 3)
    assert found.reason == "stopped at step 3 of 12, saved; the same command goes on from there"
    assert train.main(settings(tiny_shards, tmp_path)) == exit_codes.BAD_INPUT
    found = run_state.read(tmp_path)
    assert (found.state, found.action, found.step) == ("failed", "mend", 4)
    assert found.reason == "the cause of it all"
