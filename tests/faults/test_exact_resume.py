"""A job that is killed at any moment and started again ends with the bits of one that was left alone."""

import random
import signal
import time

import pytest
import torch

from fastssl import checkpoint
from fastssl.log import read_metrics
from tests.fastssl.runs import leaves
from tests.faults import methods
from tests.faults.lives import Watch, chain, start_torchrun
from tests.faults.record import times

STEPS = times(10, 20)  # an epoch's edge comes after 7
QUICK = {1: {*methods.FORMS} - {"moco_v1", "moco_v2", "moco_bf16", "clsa_single", "clsa_sym"}, 2: {"swav"}}


class Runs:
    """Starts runs of one form and remembers the uninterrupted one. ranks: 1 or more; agent: under torchrun."""

    def __init__(self, server, data, folder):
        self.server, self.data, self.folder = server, data, folder
        self.references, self.kills = {}, 0

    def start(self, form, name, ranks, agent, die=""):
        run_dir = self.folder / f"{form}-{ranks}-{agent}-{name}"
        arguments = methods.settings(form, self.data, run_dir, STEPS)
        watch = Watch(chain=str(run_dir / "chain"), die=die)
        if agent:
            return start_torchrun("fastssl.train", arguments, watch, ranks=ranks, folder=self.folder), run_dir
        return self.server.start("fastssl.train", arguments, watch, ranks=ranks), run_dir

    def reference(self, form, ranks, agent=False):
        """The folder of the run that nobody disturbed, the seconds to its first batch, and those from there on."""
        if (form, ranks, agent) not in self.references:
            began = time.monotonic()
            life, run_dir = self.start(form, "reference", ranks, agent)
            _until_a_batch(life, run_dir / "chain")
            started = time.monotonic()
            assert life.finish() == 0, life.err
            self.references[form, ranks, agent] = run_dir, started - began, time.monotonic() - started
        return self.references[form, ranks, agent]

    def kill_at_random(self, form, ranks, agent, kills, rng):
        """Runs until there were that many kills and the last run is done; every one is compared when it is done."""
        number = 0
        reference, to_first_batch, to_the_end = self.reference(form, ranks, agent)
        while kills:
            life, run_dir = self.start(form, f"killed-{number}", ranks, agent)
            while kills:
                if rng.random() < 0.75:
                    _until_a_batch(life, run_dir / "chain")
                    code = life.wait(rng.uniform(0, to_the_end))
                else:
                    code = life.wait(rng.uniform(0, to_first_batch))
                if code is not None:
                    break
                life.kill()
                kills, self.kills = kills - 1, self.kills + 1
                life, _ = self.start(form, f"killed-{number}", ranks, agent)
            assert life.finish(300) == 0, life.err
            assert_same_run(run_dir, reference, ranks)
            number += 1


@pytest.fixture(scope="module")
def runs(fork_server, tiny_files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    return Runs(fork_server, methods.write_data(folder / "data", tiny_files), folder)


def _until_a_batch(life, folder):
    """Until the job is handed one more batch than there was, or has ended."""
    before, path = None, folder / "rank-0.jsonl"
    while life.wait(0) is None:
        size = path.stat().st_size if path.is_file() else 0
        if before is not None and size > before:
            return
        before = size if before is None else before
        time.sleep(0.002)


def assert_same_run(run_dir, reference, ranks):
    """Every batch of every rank in all lives, and all that the last checkpoint holds, to the bit."""
    for rank in range(ranks):
        want = {line["step"]: line for line in chain(reference / "chain", rank)}
        got = chain(run_dir / "chain", rank)
        assert len(want) == STEPS
        assert {line["step"] for line in got} == set(range(STEPS))
        different = [line["step"] for line in got if line != want[line["step"]]]
        assert not different, f"rank {rank}: other batches at steps {different}"
    mine, theirs = everything(run_dir), everything(reference)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not _equal(mine[name], theirs[name])]
    assert not different, different[:5]
    lines, expected = read_metrics(run_dir), read_metrics(reference)
    assert [_numbers(line) for line in lines] == [_numbers(line) for line in expected]


def everything(run_dir):
    """All values of the newest checkpoint by file and name: weights, queue, optimiser, scaler, random states."""
    folder = checkpoint.newest(run_dir)
    values = leaves(folder, (file.name for file in folder.glob("*.pt")))
    assert len(values) > 30
    assert folder.name == f"step-{STEPS:08d}"
    return values


def _equal(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def _numbers(line):
    return {name: value for name, value in line.items() if name not in ("images_per_s", "step_s", "data_wait")}


@pytest.mark.fault(
    "SIGKILL to the whole job at a random moment: one process, or two ranks",
    "the same command goes on; every batch and the last checkpoint are those of an undisturbed run, to the bit",
    exit_code=0,
)
@pytest.mark.parametrize(
    ("form", "ranks"),
    [
        pytest.param(form, ranks, marks=[] if form in QUICK[ranks] else pytest.mark.slow)
        for ranks in (1, 2)
        for form in methods.FORMS
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(runs, form, ranks, record_property):
    kills = times(1, 6)
    runs.kill_at_random(form, ranks, False, kills, random.Random(f"{form} {ranks}"))
    record_property("seen", f"{form} on {ranks}: {kills} of {kills}")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.fault(
    "SIGKILL to torchrun and both ranks at a random moment",
    "the same command goes on; every batch and the last checkpoint are those of an undisturbed run, to the bit",
    exit_code=0,
)
@pytest.mark.parametrize("form", methods.FORMS)
def test_a_killed_torchrun_goes_on_to_the_same_bits(runs, form, record_property):
    kills = times(1, 3)
    runs.kill_at_random(form, 2, True, kills, random.Random(form))
    record_property("seen", f"{form}: {kills} of {kills}")


@pytest.mark.fault(
    "SIGKILL at a chosen moment: mid-epoch, at an epoch's edge, between data and step, at each point of a save",
    "the same command goes on to the same bits",
    exit_code=0,
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_a_chosen_moment_goes_on_to_the_same_bits(runs, ranks, record_property):
    edge, last = methods.STEPS_PER_EPOCH, ranks - 1
    lives = [["fsync:5", f"batch:3@{last}", "rename:1", f"batch:{edge}@0", "rename:2", f"batch:{edge + 2}@{last}"]]
    if times(0, 1):
        lives += [[f"fsync:{n}" for n in range(first, first + 4)] for first in range(1, 17, 4)]
        lives += [[f"rename:{n}" for n in range(1, 5)], [f"batch:{n}@0" for n in range(edge - 1, STEPS, 2)]]
    reference, *_ = runs.reference("moco_v2", ranks)
    for number, points in enumerate(lives):
        for point in points:
            life, run_dir = runs.start("moco_v2", f"chosen-{number}", ranks, False, die=point)
            assert life.finish() == -signal.SIGKILL, (point, life.err)
        life, _ = runs.start("moco_v2", f"chosen-{number}", ranks, False)
        assert life.finish() == 0, life.err
        assert_same_run(run_dir, reference, ranks)
    record_property("seen", f"{sum(map(len, lives))} moments on {ranks}")


@pytest.mark.fault("SIGKILL while a resumed run takes up metrics.jsonl", "no line is lost", exit_code=0)
@pytest.mark.parametrize("point", ["emptied:metrics.jsonl", "rename:1"])
def test_a_run_killed_while_it_resumes_keeps_its_metrics(runs, point):
    reference, *_ = runs.reference("moco_v2", 1)
    name = f"metrics-{point.partition(':')[0]}"
    for die in ("batch:6", point, ""):
        life, run_dir = runs.start("moco_v2", name, 1, False, die=die)
        assert life.finish() in (0, -signal.SIGKILL), life.err
    assert_same_run(run_dir, reference, 1)
