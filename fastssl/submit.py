"""Queue a training run on Slurm: `fastssl-submit submit.nodes=2 submit.gpus_per_node=8 -- method=moco_v2 ...`.

Through submitit (the extra `slurm`), with one task a node that starts torchrun there: so a rank that dies is started
again without queueing, as with torchrun by hand, and the ranks get the environment that fastssl.dist reads.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from fastssl import config, run_state
from fastssl.settings import require
from shard_tools import exit_codes

if TYPE_CHECKING:
    import submitit

HELP = """
fastssl-submit: queue a training run on Slurm, and queue it again until it is done

  fastssl-submit submit.nodes=2 submit.gpus_per_node=8 submit.hours=24 -- method=moco_v2 data.root=SHARDS run.dir=RUN

settings are key=value; those of submit.* are about the job, all others are fastssl-train's and must have a run.dir
  submit.nodes=1 submit.gpus_per_node=1  submit.cpus_per_node=0 submit.memory_gb=0 (0: what the cluster gives)
  submit.ranks_per_node=0  (0: one for each GPU)
  submit.hours=24          the limit of one job: before it the run is saved and queued again, submit.requeues=100 times
  submit.grace_s=120       so many seconds before the limit
  submit.restarts=3        torchrun starts the ranks again so often when one dies
  submit.partition= submit.account= submit.qos= submit.constraint= submit.name=   submit.setup=["module load cuda"]
  submit.executor=auto|slurm|local   local runs it on this machine, at once
exit codes: 0 queued, 2 a setting is wrong
"""
MOST_STARTS = 3  # that come no further than the one before: what is queued again without end helps nobody


@dataclass(frozen=True)
class Submit:
    """As configs/submit.yaml describes it."""

    executor: Literal["auto", "slurm", "local"] = "auto"
    nodes: int = 1
    gpus_per_node: int = 1
    ranks_per_node: int = 0
    cpus_per_node: int = 0
    memory_gb: int = 0
    hours: float = 24.0
    requeues: int = 100
    grace_s: int = 120
    restarts: int = 3
    name: str = ""
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require(self.nodes >= 1, "submit.nodes", self.nodes, "1 or more")
        for key in ("gpus_per_node", "ranks_per_node", "cpus_per_node", "memory_gb", "requeues", "restarts"):
            require(getattr(self, key) >= 0, f"submit.{key}", getattr(self, key), "0 or more")
        require(self.grace_s >= 30, "submit.grace_s", self.grace_s, "30 or more: a checkpoint must fit in")
        require(self.hours * 1800 >= self.grace_s, "submit.hours", self.hours, "at least twice submit.grace_s")

    @property
    def ranks(self) -> int:
        """On each node."""
        return self.ranks_per_node or max(1, self.gpus_per_node)


def main(argv: list[str] | None = None) -> int:
    return config.run_command(_command, HELP, argv)


def _command(arguments: list[str]) -> None:
    ours = [a for a in arguments if a.lstrip("+~").startswith("submit.")]
    overrides = [a for a in arguments if a not in ours and a != "--"]
    wish = config.convert(Submit, config.compose("submit", ours)["submit"], "submit")
    run_dir = Path(config.load(overrides).run.dir)  # a setting that is wrong is said now, not when the job starts
    job = submit(wish, Job(overrides, str(run_dir), os.getcwd(), wish.nodes, wish.ranks, wish.restarts, wish.grace_s))
    print(f"job {job.job_id}: {wish.nodes} node(s) with {wish.ranks} rank(s) each, {wish.hours:g} h at a time")
    print(f"log: {job.paths.stderr}")


def submit(wish: Submit, job: Job) -> submitit.Job[int]:
    """Queue `job`; what submitit keeps goes to `submit/` in the run's folder. Raises ConfigError."""
    try:
        import submitit
    except ModuleNotFoundError:
        raise config.ConfigError(
            "fastssl-submit needs submitit; install it with pip install 'fastssl-train[slurm]', or use the templates of"
            " docs/slurm.md"
        ) from None
    cluster = _cluster(wish)
    folder = Path(job.folder, job.run_dir, "submit")
    executor = submitit.AutoExecutor(folder, cluster=cluster, **{f"{cluster}_max_num_timeout": wish.requeues})
    slurm = {key: getattr(wish, key) or None for key in ("partition", "account", "qos", "constraint")}
    executor.update_parameters(
        name=wish.name or Path(job.run_dir).name,
        nodes=wish.nodes,
        gpus_per_node=wish.gpus_per_node,
        tasks_per_node=1,
        cpus_per_task=wish.cpus_per_node or None,
        mem_gb=float(wish.memory_gb) or None,
        timeout_min=int(60 * wish.hours),
        slurm_signal_delay_s=wish.grace_s,
        slurm_setup=list(wish.setup) or None,
        slurm_additional_parameters={"requeue": True},  # also when a node fails
        **{f"slurm_{key}": value for key, value in slurm.items()},
    )
    return executor.submit(job)


def _cluster(wish: Submit) -> str:
    found = shutil.which("sbatch") is not None and shutil.which("srun") is not None
    if wish.executor != "local" and not found:
        raise config.ConfigError(
            f"submit.executor is {wish.executor!r}, but this machine has no sbatch and srun; submit from one that has,"
            " or run it here with submit.executor=local"
        )
    if wish.executor == "local" and wish.nodes > 1:
        raise config.ConfigError(f"submit.nodes is {wish.nodes}, but submit.executor=local has one; say submit.nodes=1")
    return "local" if wish.executor == "local" else "slurm"


@dataclass
class Job:
    """What each node's task does: torchrun with this node's ranks. Called by submitit, in the job.

    The first node's task answers submitit's signal before the time limit: `checkpoint` waits until the run is saved,
    and submitit queues the same command again. The other nodes' tasks hand the signal on to their torchrun.
    """

    overrides: list[str]
    run_dir: str
    folder: str
    nodes: int
    ranks_per_node: int
    restarts: int
    grace_s: int

    def __post_init__(self) -> None:
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._ended_by_slurm = self._asked = False

    def __call__(self) -> int:
        """Ends with the run's own exit code, or with 0 where the run is queued again."""
        import submitit

        environment = submitit.JobEnvironment()
        before = run_state.read(self._run_dir)
        before_limit = getattr(signal, f"SIG{environment.USR_SIG}")
        # SIGTERM alone is Slurm ending the job, by scancel or to requeue it: the run is saved, the rest is Slurm's.
        signal.signal(signal.SIGTERM, self._end)
        if environment.global_rank > 0:
            signal.signal(before_limit, self._hand_on)
        variables = {**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.grace_s - 15)}
        self._torchrun = subprocess.Popen(self._command(environment), cwd=self.folder, env=variables)
        while self._torchrun.poll() is None:
            time.sleep(0.1)
        if self._torchrun.returncode == 0:
            return exit_codes.DONE
        now = run_state.read(self._run_dir)
        if now is None or now == before:
            raise SystemExit(exit_codes.BUG)  # it never came to training; the log says why
        again = now.action == "requeue" and now.starts <= MOST_STARTS and not self._ended_by_slurm
        if again and environment.global_rank == 0:
            signal.raise_signal(before_limit)  # submitit's handler, which requeues and ends this process
        raise SystemExit(exit_codes.DONE if again else now.exit_code or exit_codes.BUG)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Asked by submitit before it requeues: returns when the run is saved, or has had the time for it."""
        import submitit

        self._hand_on()
        until = time.monotonic() + self.grace_s - 10
        while not self._has_ended() and time.monotonic() < until:
            time.sleep(0.1)
        return submitit.helpers.DelayedSubmission(replace(self))

    @property
    def _run_dir(self) -> Path:
        return Path(self.folder, self.run_dir)

    def _command(self, environment: Any) -> list[str]:
        where = ["--standalone"]
        if self.nodes > 1:
            port = 20000 + int(environment.raw_job_id) % 10000
            where = [
                f"--nnodes={self.nodes}", "--rdzv-backend=c10d", f"--rdzv-id={environment.raw_job_id}",
                f"--rdzv-endpoint={environment.hostnames[0]}:{port}",
            ]  # fmt: skip
        ranks = [f"--nproc-per-node={self.ranks_per_node}", f"--max-restarts={self.restarts}"]
        return [sys.executable, "-m", "torch.distributed.run", *where, *ranks, "-m", "fastssl.train", *self.overrides]

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._ended_by_slurm = True
        self._hand_on()

    def _hand_on(self, *_: object) -> None:
        """Once: a second signal would end the ranks where they are."""
        if self._torchrun is not None and not self._asked and not self._has_ended():
            self._asked = True
            os.kill(self._torchrun.pid, signal.SIGTERM)

    def _has_ended(self) -> bool:
        """Without Popen.poll, whose lock the signal that brought us here may have interrupted."""
        if self._torchrun is None or self._torchrun.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self._torchrun.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True


if __name__ == "__main__":
    sys.exit(main())
