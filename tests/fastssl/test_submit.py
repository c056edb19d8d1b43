"""fastssl-submit: by submitit's local executor for real, by Slurm as far as what is handed to sbatch."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl import checkpoint, config, submit, train
from tests.fastssl.runs import REPOSITORY, assert_same_state, finish, settings, start

STEPS = "run.duration=60steps"  # a second or more, in which a signal meets it
LOCAL = ("submit.executor=local", "submit.gpus_per_node=0")


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


@pytest.mark.dist
@pytest.mark.fault("a job of fastssl-submit near its time limit (SIGUSR2)", "saved, requeued, ends in the same bits")
def test_a_job_that_is_interrupted_is_requeued_and_ends_as_if_it_had_not_been(tiny_shards, tmp_path, record_property):
    reference, run_dir = tmp_path / "reference", tmp_path / "run of mine"
    assert train.run(config.load(settings(tiny_shards, reference, STEPS))) == 0
    training = settings(tiny_shards, run_dir, STEPS, "run.log_every=1", "run.save_every=never")
    said = tmp_path / "said"
    with said.open("w") as file:  # no pipe: the job outlives the command and would hold it open
        command = [sys.executable, "-m", "fastssl.submit", *LOCAL, "--", *training]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        subprocess.run(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file, timeout=120)
    assert said.read_text().startswith("job "), said.read_text()
    first, _, where = said.read_text().strip().partition("\n")
    job, log = int(first.split(":")[0].removeprefix("job ")), Path(where.removeprefix("log: "))
    assert log.parent == run_dir / "submit"

    def wait_for(text: str) -> None:
        until = time.monotonic() + 120
        while not (log.is_file() and text in log.read_text()):
            assert Path(f"/proc/{job}").is_dir(), log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.02)

    try:
        wait_for("step 1/60 ")
        (task,) = children(job)
        os.kill(task, signal.SIGUSR2)
        wait_for("resumed at step ")
        saved = checkpoint.newest(run_dir)
        assert 1 < int(saved.name.removeprefix("step-")) < 60
        wait_for("step 60/60 ")
        out = Path(str(log).replace(".err", ".out"))
        until = time.monotonic() + 60
        while "Job completed successfully" not in out.read_text() + log.read_text():
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
    finally:
        for process in (*children(job), job):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
    assert_same_state(run_dir, reference)
    record_property("seen", "saved, requeued, same bits")


SBATCH = """#!/bin/bash
cp "$1" "$SLURM_STANDIN/script"
echo "Submitted batch job $SLURM_STANDIN_ID"
"""
# A task on each node, its output where it is asked to; no signal goes further than to the tasks.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
  case $1 in --output) out=$2; shift ;; --error) err=$2; shift ;; esac
  shift
done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
  place() { local path=${1//%j/$SLURM_JOB_ID}; echo "${path//%t/$node}"; }
  SLURM_PROCID=$node SLURM_NODEID=$node SLURM_LOCALID=0 "$@" >> "$(place "$out")" 2>> "$(place "$err")" &
  echo $! >> "$SLURM_STANDIN/tasks"
done
wait
"""
SCONTROL = """#!/bin/bash
[[ "$1 $2" == "requeue $SLURM_JOB_ID" ]] && echo "$2" >> "$SLURM_STANDIN/requeued"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands in a folder on PATH: sbatch keeps the script, srun runs tasks, scontrol notes its arguments."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setenv("SLURM_STANDIN_ID", "4242")
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STANDIN", str(folder))
    return folder


def test_slurm_is_asked_for_what_was_wished(slurm, tmp_path, capsys):
    run_dir = tmp_path / "runs" / "first"
    wish = ["submit.nodes=2", "submit.gpus_per_node=4", "submit.cpus_per_node=48", "submit.memory_gb=200"]
    wish += ["submit.hours=12", "submit.partition=gpu", "submit.account=me", "submit.setup=['module load cuda']"]
    assert submit.main([*wish, "--", "data.root=shards", f"run.dir={run_dir}"]) == 0
    out = capsys.readouterr().out
    assert "job 4242: 2 node(s) with 4 rank(s) each, 12 h at a time" in out
    assert f"log: {run_dir}/submit/4242_0_log.err" in out
    script = (slurm / "script").read_text()
    for line in (
        "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=4", "--cpus-per-task=48", "--mem=200GB", "--time=720",
        "--partition=gpu", "--account=me", "--job-name=first", "--signal=USR2@120", "--requeue", "--open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH {line}\n" in script, line
    assert script.index("\nmodule load cuda\n") < script.index("\nsrun ")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["submit.nodes=0"], "submit.nodes is 0, but must be 1 or more"),
        (["submit.nodes=two"], "submit.nodes is 'two', but must be a whole number"),
        (["submit.node=2"], "unknown setting 'submit.node' (did you mean 'submit.nodes'?)"),
        (["submit.hours=0.01"], "submit.hours is 0.01, but must be at least twice submit.grace_s"),
        (["--", "optim.learning_rate=1"], "unknown setting 'optim.learning_rate'"),
        (["submit.executor=local", "submit.nodes=2"], "submit.executor=local has one"),
        ([], "this machine has no sbatch and srun; submit from one that has, or run it here with"),
    ],
)
def test_a_wrong_wish_is_one_sentence_and_nothing_is_queued(tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert submit.main([*arguments, "data.root=shards", f"run.dir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_submitit_one_sentence_names_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert submit.main(["submit.executor=local", "data.root=shards", f"run.dir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert "pip install 'fastssl-train[slurm]'" in err
    assert err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.fault("a job of fastssl-submit on two nodes near its limit", "saved, requeued, ends in the same bits")
def test_two_nodes_are_signalled_requeued_and_end_as_if_they_had_not_been(
    slurm, tiny_shards, tmp_path, monkeypatch, capsys, record_property
):
    reference, run_dir, job_id = tmp_path / "reference", tmp_path / "run", str(os.getpid())
    code, _, err = finish(start("fastssl.train", settings(tiny_shards, reference, STEPS), ranks=2))
    assert code == 0, err
    for name, value in {"SLURM_STANDIN_ID": job_id, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}.items():
        monkeypatch.setenv(name, value)
    training = settings(tiny_shards, run_dir, STEPS, "run.log_every=1", "run.save_every=never")
    assert submit.main(["submit.nodes=2", "--", *training]) == 0
    assert f"job {job_id}: 2 node(s) with 1 rank(s) each" in capsys.readouterr().out
    allocated = {"SLURM_JOB_ID": job_id, "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2"}
    environment = {**os.environ, **allocated, "SLURM_JOB_NODELIST": "localhost,localhost"}

    def begin() -> subprocess.Popen:
        (slurm / "tasks").unlink(missing_ok=True)
        return subprocess.Popen(["bash", str(slurm / "script")], cwd=REPOSITORY, env=environment)

    def log() -> str:
        return "".join(path.read_text() for path in sorted((run_dir / "submit").glob("*_log.*")))

    job, until = begin(), time.monotonic() + 120
    while "step 1/60 " not in log():
        assert job.poll() is None, log()
        assert time.monotonic() < until, log()
        time.sleep(0.02)
    for task in (slurm / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR2)
    job.wait(60)
    assert (slurm / "requeued").read_text().split() == [job_id]
    assert 1 < int(checkpoint.newest(run_dir).name.removeprefix("step-")) < 60
    assert begin().wait(180) == 0, log()
    assert (slurm / "requeued").read_text().split() == [job_id]
    assert log().count("Job completed successfully") >= 2
    assert_same_state(run_dir, reference)
    record_property("seen", "saved, requeued, same bits")
