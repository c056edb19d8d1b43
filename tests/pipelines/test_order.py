"""Order: each sample once an epoch, whoever reads it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from scipy import stats

from pipelines.order import order, rows_for_step, windowed_order

SEEDS = st.integers(0, 2**64 - 1)
EPOCHS = st.integers(0, 2**32 - 1)
SHARD_SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(num_samples=st.integers(0, 300), seed=SEEDS, epoch=EPOCHS)
@settings(max_examples=100, deadline=None)
def test_an_epoch_holds_each_sample_once(num_samples, seed, epoch):
    assert_array_equal(np.sort(order(num_samples, seed, epoch)), np.arange(num_samples))


@given(sizes=SHARD_SIZES, seed=SEEDS, epoch=EPOCHS, window=st.integers(1, 15))
@settings(max_examples=100, deadline=None)
def test_a_windowed_epoch_holds_each_sample_once_and_at_most_a_window_of_open_shards(sizes, seed, epoch, window):
    permutation = windowed_order(sizes, seed, epoch, window)
    assert_array_equal(np.sort(permutation), np.arange(sum(sizes)))
    shard_of = np.repeat(np.arange(len(sizes)), sizes)[permutation]
    first, last = {}, {}
    for place, shard in enumerate(shard_of.tolist()):
        first.setdefault(shard, place)
        last[shard] = place
    for place in range(len(shard_of)):
        assert sum(first[shard] <= place <= last[shard] for shard in first) <= window


def test_a_window_over_all_shards_is_the_global_order():
    assert_array_equal(windowed_order([5, 7, 3], 1, 2, window=3), order(15, 1, 2))


def test_a_windowed_epoch_visits_the_shards_in_another_order_each_time():
    firsts = {int(windowed_order([4] * 20, 0, epoch, window=1)[0]) // 4 for epoch in range(50)}
    assert len(firsts) > 12


@given(
    num_samples=st.integers(1, 200),
    share=st.integers(1, 8),
    seed=SEEDS,
    epoch=EPOCHS,
)
@settings(max_examples=100, deadline=None)
def test_ranks_partition_each_step_and_only_the_tail_is_left_out(num_samples, share, seed, epoch):
    batch_size = 4 * share
    permutation = order(num_samples, seed, epoch)
    seen = []
    for step in range(num_samples // batch_size):
        whole = rows_for_step(permutation, step, batch_size)
        for world in (1, 2, 4):
            parts = [rows_for_step(permutation, step, batch_size, rank, world) for rank in range(world)]
            assert {len(part) for part in parts} == {batch_size // world}
            assert_array_equal(np.concatenate(parts), whole)
        seen.extend(whole.tolist())
    assert seen == permutation[: len(seen)].tolist()
    assert len(permutation) - len(seen) == num_samples % batch_size


@pytest.mark.parametrize(("seed", "epoch"), [(1, 0), (0, 1), (2**32, 0)])
def test_seeds_and_epochs_shuffle_differently(seed, epoch):
    same = (order(1000, 0, 0) == order(1000, seed, epoch)).sum()
    assert same < 10  # one is expected by chance


def test_every_sample_comes_to_every_place():
    """Chi-square over sample x place, 6 samples and 6,000 epochs."""
    counts = np.zeros((6, 6))
    for epoch in range(6000):
        counts[order(6, 3, epoch), np.arange(6)] += 1
    statistic = ((counts - 1000) ** 2 / 1000).sum()
    assert stats.chi2.sf(statistic, df=25) > 1e-4


def test_the_order_is_what_it_was_in_version_1():
    assert order(10, 7, 3).tolist() == [4, 3, 1, 8, 9, 2, 0, 6, 5, 7]
    assert windowed_order([3, 3, 3, 3], 7, 3, window=2).tolist() == [4, 3, 1, 2, 0, 5, 11, 8, 9, 6, 10, 7]


def test_the_order_of_a_large_data_set_does_not_depend_on_how_it_is_computed(monkeypatch):
    whole = order(5000, 1, 2)
    monkeypatch.setattr("pipelines.order._PIECE", 777)
    assert_array_equal(order(5000, 1, 2), whole)
