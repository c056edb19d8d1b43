"""Hours in short: lives that are killed and go on, beside one that is left alone; nothing may pile up."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from fastssl import checkpoint
from shard_tools import exit_codes
from tests.faults import methods
from tests.faults.lives import Watch, start_torchrun
from tests.faults.record import times

SECONDS = times(60, 1200)
SAVES = ["run.save_every=5steps", "run.log_every=10", "knn.every=50steps"]
ENDLESS = 10**6
KILLED = [("moco_watched", 1, False), ("swav", 2, False), ("moco_watched", 1, False), ("unmix_moco", 2, True)]


class Sampler:
    """What a process holds, once a second."""

    def __init__(self, pid):
        self.pid, self.rows = pid, []

    def look(self):
        status = Path(f"/proc/{self.pid}/status").read_text()
        fields = dict(line.split(":", 1) for line in status.splitlines())
        descriptors = len(os.listdir(f"/proc/{self.pid}/fd"))
        megabytes = int(fields["VmRSS"].split()[0]) / 1024
        self.rows.append((time.monotonic(), megabytes, descriptors, int(fields["Threads"])))

    def after_warming_up(self):
        """Seconds, megabytes, descriptors and threads of the last two thirds."""
        return np.array(self.rows[len(self.rows) // 3 :]).T


def entries(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*")}


def steps_saved(run_dir):
    with contextlib.suppress(checkpoint.CheckpointError):
        if folder := checkpoint.newest(run_dir):
            return int(folder.name.removeprefix("step-"))
    return 0


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.fault(
    "20 minutes of training, SIGKILL and resume, beside a run that is left alone",
    "each life goes on; memory, descriptors, threads, processes, temporary files and shared memory do not grow",
    exit_code=75,
)
def test_nothing_piles_up(fork_server, tiny_files, tmp_path, record_property):
    data = methods.write_data(tmp_path / "data", tiny_files)
    temporary, rng = tmp_path / "temporary", random.Random(11)
    temporary.mkdir()
    environment, shared = {"TMPDIR": str(temporary)}, entries("/dev/shm")

    def arguments(form, ranks):
        more = [s for s in SAVES if form == "moco_watched" or not s.startswith("knn")]
        return methods.settings(form, data, tmp_path / f"{form}-{ranks}", ENDLESS, *more)

    long_dir = tmp_path / "long"
    settings = methods.settings("moco_watched", data, long_dir, ENDLESS, *SAVES)
    long = fork_server.start("fastssl.train", settings, environment=environment)
    sampler, ends = Sampler(long.pid), time.monotonic() + SECONDS
    kills = agents = 0
    reached = dict.fromkeys(KILLED, 0)
    try:
        while time.monotonic() < ends:
            kind = form, ranks, agent = KILLED[kills % len(KILLED)]
            run_dir = tmp_path / f"{form}-{ranks}"
            watch, output = Watch(chain=str(tmp_path / "chain" / str(kills))), tmp_path / "torchrun"
            if agent:
                life = start_torchrun(
                    "fastssl.train", arguments(form, ranks), watch, ranks=ranks, folder=output, environment=environment
                )
            else:
                life = fork_server.start(
                    "fastssl.train", arguments(form, ranks), watch, ranks=ranks, environment=environment
                )
            first = Path(watch.chain) / "rank-0.jsonl"
            until = time.monotonic() + 60
            while not first.is_file() and time.monotonic() < until:
                sampler.look()
                assert life.wait(0.5) is None, life.err
            until = time.monotonic() + rng.uniform(0, 6)
            while time.monotonic() < until:
                sampler.look()
                assert life.wait(min(1, max(0, until - time.monotonic()))) is None, life.err
            life.kill()
            kills, agents = kills + 1, agents + agent
            assert not life.processes()
            assert steps_saved(run_dir) >= reached[kind], "a life lost what an earlier one had saved"
            reached[kind] = steps_saved(run_dir)
            assert len(entries(run_dir / "checkpoints")) < 40
        os.kill(long.pid, signal.SIGTERM)
        assert long.finish(30) == exit_codes.STOPPED, long.err
    finally:
        long.kill()

    seconds, megabytes, descriptors, threads = sampler.after_warming_up()
    slope = np.polyfit(seconds / 60, megabytes, 1)[0]
    middle = len(seconds) // 2
    assert kills >= SECONDS / 20
    assert all(reached.values()) or times(1, 0), reached
    minutes = (seconds[-1] - seconds[0]) / 60
    assert slope * minutes <= max(1.0 * minutes, 4.0), f"{slope:.2f} MB a minute"  # the allocator's own come and go
    for what in (descriptors, threads):
        assert np.median(what[middle:]) <= np.median(what[:middle])
        assert what.max() <= np.median(what[:middle]) + 20  # a monitor's or a save's own, while they work
        assert what[middle:].max() <= what[:middle].max() + 2
    left = entries(temporary)  # torchrun's own, an empty folder each that its SIGKILL leaves
    assert all(name.startswith("torchelastic_") for name in left), left
    assert not [path for path in temporary.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(list(temporary.iterdir())) <= agents
    assert entries("/dev/shm") <= shared
    steps = steps_saved(long_dir)
    record_property(
        "seen",
        f"{SECONDS} s, {kills} kills, {steps} steps of the long life: {slope:+.2f} MB a minute, "
        f"{int(np.median(descriptors))} descriptors, {int(np.median(threads))} threads throughout",
    )
