import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from fastssl.evaluate.accuracy import NOWHERE, place_of
from fastssl.evaluate.features import Features
from fastssl.evaluate.knn import class_scores, knn, nearest
from tests.oracle import knn as oracle


def features(array, labels):
    return Features(torch.as_tensor(array), torch.as_tensor(labels), torch.arange(len(labels)))


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def test_scores_have_the_golden_value():
    query = torch.tensor([[1.0, 0.2]])
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.0, 1.0], [1.0, -0.4], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 0, 2])
    similarities, rows = nearest(query, bank, 3)
    scores = class_scores(similarities, labels[rows], 3, 0.1)
    assert_allclose(scores.numpy(), [[22480.8, 13687.6, 0.0]], atol=0.05)  # the golden value has one decimal


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 9),
    bank=st.integers(1, 40),
    width=st.integers(1, 8),
    k=st.integers(1, 60),
    temperature=st.sampled_from([0.03, 0.07, 0.1, 1.0]),
)
def test_accuracy_and_scores_match_the_oracle(seed, queries, bank, width, k, temperature):
    rng = np.random.default_rng(seed)
    # two dimensions and more: in one, all similarities are +-1, and ties would make the order a matter of taste
    q, b = rng.normal(size=(queries, width + 1)), rng.normal(size=(bank, width + 1))
    truth, labels = rng.integers(0, 4, queries), rng.integers(0, 4, bank)
    expected = oracle.class_scores(q, b, labels, k, temperature, 4)
    similarities, rows = nearest(torch.from_numpy(q), torch.from_numpy(b), min(k, bank))
    ours = class_scores(similarities, torch.from_numpy(labels)[rows], 4, temperature)
    assert_allclose(ours.numpy(), expected, rtol=1e-9)
    (result,) = knn(features(q, truth), features(b, labels), num_classes=4, ks=[k], temperatures=[temperature])
    assert result.k == min(k, bank)
    assert result.top1 == pytest.approx(oracle.accuracy(expected, truth, 1))
    assert result.top5 == pytest.approx(oracle.accuracy(expected, truth, 5))


@pytest.mark.parametrize(("query_chunk", "bank_chunk"), [(1, 1), (3, 7), (5, 50), (1000, 1000)])
def test_chunks_do_not_change_the_neighbours(rng, query_chunk, bank_chunk):
    q, b = torch.from_numpy(rng.normal(size=(13, 6))), torch.from_numpy(rng.normal(size=(101, 6)))
    similarities, rows = nearest(q, b, 20, query_chunk=query_chunk, bank_chunk=bank_chunk)
    expected = (q / q.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T
    order = expected.argsort(dim=1, descending=True)[:, :20]
    assert_array_equal(rows, order)
    assert_allclose(similarities, expected.gather(1, order), rtol=1e-12)


def test_many_k_and_temperatures_at_once_equal_one_at_a_time(rng):
    q, b = rng.normal(size=(30, 5)), rng.normal(size=(80, 5))
    queries, bank = features(q, rng.integers(0, 7, 30)), features(b, rng.integers(0, 7, 80))
    together = knn(queries, bank, num_classes=7, ks=[1, 5, 20, 500], temperatures=[0.07, 0.5])
    pairs = [(k, t) for k in [1, 5, 20, 500] for t in [0.07, 0.5]]
    assert together == [knn(queries, bank, num_classes=7, ks=[k], temperatures=[t])[0] for k, t in pairs]


def test_two_k_beyond_the_bank_are_reported_once(rng):
    bank = features(rng.normal(size=(12, 5)), rng.integers(0, 3, 12))
    assert [r.k for r in knn(bank, bank, num_classes=3, ks=[10, 100, 200])] == [10, 12]


def test_only_the_direction_of_features_counts(rng):
    q, b = rng.normal(size=(20, 5)), rng.normal(size=(50, 5))
    truth, labels = rng.integers(0, 3, 20), rng.integers(0, 3, 50)
    plain = knn(features(q, truth), features(b, labels), num_classes=3)
    scaled = knn(features(q * 7, truth), features(b * rng.uniform(0.1, 10, size=(50, 1)), labels), num_classes=3)
    assert scaled == plain


def test_equal_scores_go_to_the_lower_class_and_a_class_without_a_vote_is_never_found():
    twins = features(np.array([[1.0, 0.0], [1.0, 0.0]]), [2, 1])
    both = features(np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]), [1, 2, 0])
    (result,) = knn(both, twins, num_classes=3, ks=[2])
    assert result.top1 == pytest.approx(1 / 3)  # class 1 wins over class 2
    assert result.top5 == pytest.approx(2 / 3)  # class 0 had no vote, though only three classes exist


def test_a_score_that_is_not_a_number_is_in_no_top_5_even_of_three_classes():
    scores = torch.tensor([[0.1, 0.5, 0.5], [torch.nan, torch.nan, torch.nan]])
    assert place_of(scores, torch.tensor([2, 0])).tolist() == [1, NOWHERE]
    assert NOWHERE >= 5


@pytest.mark.parametrize(("ks", "temperatures"), [([0], [0.1]), ([1], [0.0]), ([1], [float("nan")])])
def test_senseless_settings_are_refused_by_name(rng, ks, temperatures):
    bank = features(rng.normal(size=(12, 5)), rng.integers(0, 3, 12))
    with pytest.raises(ValueError, match=r"evaluator\.(k|temperature) holds"):
        knn(bank, bank, num_classes=3, ks=ks, temperatures=temperatures)
