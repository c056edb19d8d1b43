"""Large splits: memory bounded by bytes a sample, work by counts; seconds only where a test is marked slow."""

from __future__ import annotations

import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from bench import startup
from pipelines.augment import AugmentSpec
from pipelines.loader import Loader
from pipelines.order import order, windowed_order
from pipelines.views import ViewSpec
from shard_tools import manifest as manifests
from shard_tools.manifest import Manifest

SPECS = [ViewSpec("query", 32, augment=AugmentSpec(flip_p=0.5))]
NUM_SHARDS, NUM_SAMPLES = 200, 200_000
GOAL_BYTES, GOAL_SAMPLES = 2e9, 14e6  # resident memory of a start, and the samples for which it has to do
LIBRARIES_BYTES = 1e9  # resident once torch is imported and a batch of 256 is on its way (bench/startup.py)
BYTES_A_SAMPLE = (GOAL_BYTES - LIBRARIES_BYTES) / GOAL_SAMPLES - manifests.INDEX_DTYPE.itemsize  # beside the index


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Manifest:
    root = tmp_path_factory.mktemp("large")
    startup.write_hollow_split(root, NUM_SHARDS, NUM_SAMPLES)
    return Manifest.load(root)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Manifest:
    root = tmp_path_factory.mktemp("small")
    startup.write_hollow_split(root, 2, 2000)
    return Manifest.load(root)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most that was allocated at a time, beyond what there was; mapped files do not count."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        work()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_the_split_of_these_tests_is_as_hollow_as_it_says(large):
    assert large.check_quick() == []
    sizes = [(large.root / shard.name).stat() for shard in large.shards]
    assert sum(size.st_size for size in sizes) > 20e9
    assert sum(512 * size.st_blocks for size in sizes) < 10e6


def test_the_quick_check_takes_the_same_memory_whatever_the_number_of_samples(large):
    piece = peak_bytes(lambda: list(manifests._range_faults(large, [large.index()[:70_000]], Path())))
    assert peak_bytes(large.check_quick) < 1.5 * piece + 2**21  # the buffer of the hash


def test_the_quick_check_asks_once_for_each_shard_and_reads_the_index_once(large, monkeypatch):
    asked, read = Counter(), Counter()
    real_stat, real_hash = Path.stat, manifests.sha256_of
    monkeypatch.setattr(Path, "stat", lambda path, **how: asked.update([path.name]) or real_stat(path, **how))
    monkeypatch.setattr(manifests, "sha256_of", lambda path: read.update([path.name]) or real_hash(path))
    assert large.check_quick() == []
    assert {name: num for name, num in asked.items() if name.endswith(".tar")} == {
        shard.name: 1 for shard in large.shards
    }
    assert read == {"index.npy": 1}


@pytest.mark.parametrize("windowed", [False, True])
def test_two_orders_at_a_time_fit_beside_the_index(windowed):
    """The loader makes the next epoch's while it reads by this one's."""
    num_samples = 2_000_000  # so many that the pieces in which keys are made do not count
    sizes = [num_samples // NUM_SHARDS] * NUM_SHARDS
    this = order(num_samples, 0, 0)
    following = peak_bytes(lambda: windowed_order(sizes, 0, 1) if windowed else order(num_samples, 0, 1))
    sorting = 4 * num_samples  # half of the ids, which NumPy's merge sort does not tell
    assert this.nbytes + following + sorting < BYTES_A_SAMPLE * num_samples


def test_a_step_does_and_allocates_the_same_in_a_split_a_hundred_times_as_large(large, small):
    """Calls and bytes of the loader's threads over twenty steps within an epoch's first half."""
    steps_of(small)  # what is done once in a process
    few, many = steps_of(small), steps_of(large)
    for steps in (few, many):
        assert steps.calls["rows_for_step"] in range(18, 23)  # up to two more or less are on their way
        for opening in ("shard_path", "_make_room"):  # an image may be the first of its shard
            assert steps.calls.pop(opening, 0) <= 22 * 8
    assert many.calls["_permutation"] == 0
    assert many.calls.total() < 1.3 * few.calls.total()
    assert many.peak_bytes < few.peak_bytes + NUM_SAMPLES  # one array of a byte a sample would be seen


class Steps:
    """Twenty steps of 8 images behind the first two: calls of Python functions by name, bytes allocated at a time."""

    calls: Counter[str]
    peak_bytes: int


def steps_of(manifest: Manifest) -> Steps:
    found = Steps()
    found.calls = Counter()

    def note(frame, event, _):
        if event == "call" and Path(frame.f_code.co_filename).parent.name in ("pipelines", "shard_tools"):
            found.calls[frame.f_code.co_name] += 1

    threading.setprofile(note)
    try:
        loader = Loader(manifest, SPECS, batch_size=8, seed=0, backend="exact", threads=1, prefetch=1)
        with loader:
            batches = loader.batches()
            list(islice(batches, 2))
            found.calls.clear()
            # The least of some: now and then a step also meets something that is allocated once, such as for a thread.
            found.peak_bytes = min(peak_bytes(lambda: list(islice(batches, 5))) for _ in range(4))
    finally:
        threading.setprofile(None)
    return found


def test_a_loader_holds_the_index_once(large):
    """A copy of its own: a mapped file that others cut would end the process by a signal."""
    index = large.index().nbytes
    made = peak_bytes(lambda: Loader(large, SPECS, batch_size=8, seed=0, backend="exact", threads=1).close())
    assert index < made < 1.5 * index


def test_rows_of_a_step_are_a_part_of_the_order_and_no_copy(large):
    with Loader(large, SPECS, batch_size=8, seed=0, backend="exact", threads=1) as loader:
        rows = [rows for _, _, rows in islice(loader._plan(0), 3)]
    assert all(part.base is rows[0].base is not None for part in rows)
    assert len(rows[0].base) == NUM_SAMPLES


@pytest.mark.slow
def test_ten_thousand_shards_with_fourteen_million_samples_start_in_10_s_and_2_gb(tmp_path):
    out = tmp_path / "startup.json"
    assert startup.main([str(out), "--rounds", "1"]) == 0
    figures = startup.Record.load(out).figures
    assert figures["large/start_s"].median < 10
    assert figures["large/resident_gb"].median < 2
    assert figures["step_ratio"].median < 1.3
