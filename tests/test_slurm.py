"""The Slurm templates, run by bash as they are, with Slurm's commands stood in for: what is stopped goes on.

The stand-ins keep to what Slurm does where it matters here: `srun` starts a task on each node and reports the worst
exit code, a signal goes to the tasks alone and not to what they start, and `scontrol requeue` only notes the wish.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl import checkpoint, config, run_state, train
from tests.fastssl.runs import REPOSITORY, assert_same_state, finish, settings, start

TEMPLATES = sorted((REPOSITORY / "docs/slurm").glob("*.sbatch"))
SRUN = """#!/bin/bash
for ((node = 0; node < ${SLURM_JOB_NUM_NODES:-1}; node++)); do
  "$@" &
  echo $! >> "$SLURM_STANDIN/tasks"
done
worst=0
for task in $(jobs -p); do
  wait "$task" || { code=$?; (( code > worst )) && worst=$code; }
done
exit $worst
"""
SCONTROL = """#!/bin/bash
case "$1 $2" in
  "show hostnames") printf 'localhost\\nlocalhost\\n' ;;
  "requeue $SLURM_JOB_ID") echo "$2" >> "$SLURM_STANDIN/requeued" ;;
  *) exit 1 ;;
esac
"""
STEPS = "run.duration=60steps"  # a second or more, in which a signal meets it


class Slurm:
    """One job of one template: starts it, signals it, and says whether it asked to be requeued."""

    def __init__(self, folder: Path, template: str, nodes: int, ranks_per_node: int) -> None:
        self.folder, self.template = folder, REPOSITORY / "docs/slurm" / template
        folder.mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        self.environment = {
            **os.environ, "PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_STANDIN": str(folder), "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": str(nodes), "SLURM_GPUS_ON_NODE": str(ranks_per_node), "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }  # fmt: skip

    def begin(self, arguments: list[str]) -> subprocess.Popen:
        (self.folder / "tasks").unlink(missing_ok=True)
        with (self.folder / "log").open("a") as log:
            command = ["bash", str(self.template), *arguments]
            return subprocess.Popen(command, cwd=REPOSITORY, env=self.environment, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        for task in (self.folder / "tasks").read_text().split():
            os.kill(int(task), number)

    def wait_for(self, text: str, job: subprocess.Popen) -> None:
        until = time.monotonic() + 120
        while text not in self.log():
            assert job.poll() is None, self.log()
            assert time.monotonic() < until, self.log()
            time.sleep(0.02)

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def requeued(self) -> int:
        noted = self.folder / "requeued"
        return len(noted.read_text().split()) if noted.is_file() else 0


@pytest.fixture(scope="module")
def reference(tiny_shards, tmp_path_factory):
    """Ranks in all -> the folder of the same run without interruption."""

    @functools.cache
    def trained(ranks: int) -> Path:
        folder = tmp_path_factory.mktemp("reference")
        arguments = settings(tiny_shards, folder, STEPS)
        if ranks == 1:
            assert train.run(config.load(arguments)) == 0
            return folder
        code, _, err = finish(start("fastssl.train", arguments, ranks=ranks))
        assert code == 0, err
        return folder

    return trained


@pytest.mark.dist
@pytest.mark.fault(
    "a Slurm job near its time limit (SIGUSR1 to its tasks)", "saved, requeued, ends in the same bits", exit_code=75
)
@pytest.mark.parametrize(
    ("template", "nodes", "ranks_per_node"),
    [
        ("one-node.sbatch", 1, 1),
        pytest.param("one-node.sbatch", 1, 2, marks=pytest.mark.slow),
        pytest.param("several-nodes.sbatch", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_job_near_its_limit_is_requeued_and_ends_as_if_it_had_not_been(
    tiny_shards, tmp_path, reference, record_property, template, nodes, ranks_per_node
):
    run_dir = tmp_path / "run of mine"  # a blank, for the quotes
    slurm = Slurm(tmp_path / "slurm", template, nodes, ranks_per_node)
    arguments = settings(tiny_shards, run_dir, STEPS, "run.log_every=1", "run.save_every=never")
    job = slurm.begin(arguments)
    slurm.wait_for("step 1/60 ", job)
    slurm.signal(signal.SIGUSR1)
    assert job.wait(60) == 75, slurm.log()
    assert slurm.requeued() == 1
    saved = checkpoint.newest(run_dir)
    assert 1 < int(saved.name.removeprefix("step-")) < 60
    again = slurm.begin(arguments)
    assert again.wait(120) == 0, slurm.log()
    assert slurm.requeued() == 1
    assert_same_state(run_dir, reference(nodes * ranks_per_node))
    record_property("seen", f"{nodes} node(s) of {ranks_per_node} rank(s): same bits")


# Stands in for torchrun where only its end matters: leaves the state of a run, waits if told to, exits as torchrun.
TORCHRUN = """#!/bin/bash
[[ -f $SLURM_STANDIN/state ]] && cp "$SLURM_STANDIN/state" "$SLURM_STANDIN/run/run_state.json"
touch "$SLURM_STANDIN/began"
while [[ -e $SLURM_STANDIN/wait ]]; do sleep 0.02; done
exit $(( $1 ))
"""


@pytest.fixture
def ended(tmp_path) -> Slurm:
    """A job whose torchrun ends with 1; `leave` says what the run has left. Of one template: both end alike."""
    slurm = Slurm(tmp_path / "slurm", TEMPLATES[0].name, 1, 1)
    (slurm.folder / "torchrun").write_text(TORCHRUN.replace("$1", "${TORCHRUN_CODE:-1}"))
    (slurm.folder / "torchrun").chmod(0o755)
    return slurm


def leave(slurm: Slurm, exit_code: int | None, starts: int = 1) -> None:
    """run_state.json, as a run writes it; `exit_code` None is a run that was killed."""
    run_dir = slurm.folder / "left"
    run_dir.mkdir()
    state = run_state.StateKeeper(run_dir)
    for _ in range(starts):
        state.begin(20, 60)
    if exit_code is not None:
        state.end(exit_code, "a reason")
    (run_dir / run_state.FILE).rename(slurm.folder / "state")


@pytest.mark.parametrize(
    ("exit_code", "starts", "requeued"),
    [
        (75, 1, 1),
        (6, 1, 1),
        (9, 3, 1),
        (9, 4, 0),
        (None, 1, 1),
        (None, 4, 0),
        *((code, 1, 0) for code in (2, 3, 4, 7, 8)),
    ],
)
def test_a_job_is_requeued_where_a_new_start_helps(ended, exit_code, starts, requeued):
    leave(ended, exit_code, starts)
    job = ended.begin([f"run.dir={ended.folder / 'run'}"])
    assert job.wait(20) == (1 if exit_code is None else exit_code), ended.log()
    assert ended.requeued() == requeued


def test_what_an_earlier_start_has_left_requeues_nothing(ended):
    leave(ended, 75)
    (ended.folder / "run").mkdir()
    (ended.folder / "state").rename(ended.folder / "run" / run_state.FILE)
    os.utime(ended.folder / "run" / run_state.FILE, (1, 1))
    assert ended.begin([f"run.dir={ended.folder / 'run'}"]).wait(20) == 1
    assert ended.requeued() == 0


@pytest.mark.fault("a run_state.json that would run code in the batch script", "not requeued, nothing is run")
@pytest.mark.parametrize("key", ["action", "starts", "exit_code"])
def test_a_hostile_state_runs_nothing_in_the_script(ended, record_property, key):
    leave(ended, 75)
    canary = ended.folder / "canary"
    state = json.loads((ended.folder / "state").read_text())
    for value in (f"a[$(touch${{IFS}}{canary})]", f"$(touch {canary})", f"75; touch {canary}", "requeue 1 75"):
        (ended.folder / "state").write_text(json.dumps({**state, key: value}))
        assert ended.begin([f"run.dir={ended.folder / 'run'}"]).wait(20) in (1, 75)
    assert ended.requeued() == 0
    assert not canary.exists()
    record_property("seen", "4 of 4 of each key")


def test_a_job_that_slurm_ends_is_left_to_slurm(ended):
    leave(ended, 75)
    (ended.folder / "wait").touch()
    job = ended.begin([f"run.dir={ended.folder / 'run'}"])
    while not (ended.folder / "began").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert job.poll() is None, "the script must outlive the saving"
    (ended.folder / "wait").unlink()
    assert job.wait(20) == 75
    assert ended.requeued() == 0


def test_a_job_without_run_dir_is_refused_and_one_that_is_done_is_not_requeued(ended):
    assert ended.begin(["method=moco_v2"]).wait(20) == 2
    assert "the settings have no run.dir" in ended.log()
    ended.environment["TORCHRUN_CODE"] = "0"
    leave(ended, 0)
    assert ended.begin([f"run.dir={ended.folder / 'run'}"]).wait(20) == 0
    assert ended.requeued() == 0


def test_templates_ask_slurm_for_what_they_rely_on_and_end_alike():
    assert [path.name for path in TEMPLATES] == ["one-node.sbatch", "several-nodes.sbatch"]
    assert len({path.read_text().partition("code=$?")[2] for path in TEMPLATES}) == 1
    for path in TEMPLATES:
        subprocess.run(["bash", "-n", str(path)], check=True)
        head = path.read_text().split("\n\n")[0]
        for line in ("--signal=USR1@120", "--requeue", "--open-mode=append", "--ntasks-per-node=1"):
            assert f"#SBATCH {line}\n" in head, (path.name, line)
