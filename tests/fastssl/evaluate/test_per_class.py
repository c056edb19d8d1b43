import csv
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.evaluate.accuracy import place_of
from fastssl.evaluate.main import run
from fastssl.evaluate.per_class import NO_CLASS, PerClass, predicted_class
from fastssl.evaluate.settings import load
from shard_tools.manifest import Manifest
from tests.fastssl.evaluate.conftest import patches
from tests.shards import write_split

CLASSES = ("cat", "dog", "owl", "yak")
SCORES = st.sampled_from([0.0, 1.0, -1.0, float("nan"), float("-inf"), float("inf")])


def table(truth, predicted, classes=CLASSES):
    return PerClass(classes, torch.tensor(truth), torch.tensor(predicted))


EXAMPLE = table([0, 0, 0, 1, 1, 3, 3, 3], [0, 1, 1, 1, 0, 3, 0, NO_CLASS])


def test_the_matrix_is_scikit_learns(rng):
    metrics = pytest.importorskip("sklearn.metrics")
    truth, predicted = rng.integers(0, 7, 300), rng.integers(0, 7, 300)
    ours = table(truth.tolist(), predicted.tolist(), tuple("abcdefg"))
    expected = metrics.confusion_matrix(truth, predicted, labels=range(7))
    assert np.array_equal(ours.confusion().numpy(), expected)
    assert ours.accuracies() == pytest.approx(metrics.recall_score(truth, predicted, average=None).tolist())
    off_diagonal = expected - np.diag(np.diag(expected))
    assert ours.taken_for() == off_diagonal.argmax(1).tolist()  # of equals the first, as ours
    assert ours.claimed.tolist() == expected.sum(0).tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(SCORES, SCORES, SCORES), min_size=1, max_size=6), st.data())
def test_the_predicted_class_is_right_exactly_where_the_true_one_is_in_first_place(rows, data):
    scores = torch.tensor(rows)
    truth = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows))))
    assert ((predicted_class(scores) == truth) == (place_of(scores, truth) < 1)).all()


def test_a_sample_without_a_class_counts_as_missed_and_in_no_column():
    assert EXAMPLE.images.tolist() == [3, 2, 0, 3]
    assert EXAMPLE.found.tolist() == [1, 1, 0, 1]
    assert EXAMPLE.claimed.tolist() == [3, 3, 0, 1]
    assert EXAMPLE.confusion().tolist() == [[1, 2, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert EXAMPLE.taken_for() == [1, 0, None, 0]


def test_a_class_without_samples_has_no_accuracy_and_is_neither_best_nor_worst():
    assert EXAMPLE.accuracies() == [pytest.approx(1 / 3), 0.5, None, pytest.approx(1 / 3)]
    assert EXAMPLE.best_and_worst(2) == ([1, 0], [3, 0])


def test_the_csv_has_a_line_for_every_class_also_one_with_a_comma(tmp_path):
    path = tmp_path / "result-per-class.csv"
    table([0, 0, 1], [0, 1, 1], ("crane, bird", "crane, machine")).write_csv(path)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["class", "name", "images", "found", "top1", "predicted", "most_often_taken_for"],
        ["0", "crane, bird", "2", "1", "0.500000", "1", "crane, machine"],
        ["1", "crane, machine", "1", "1", "1.000000", "2", ""],
    ]


@pytest.mark.parametrize(("count", "matrix"), [(100, True), (101, False)])
def test_the_result_file_gets_the_matrix_of_up_to_100_classes(count, matrix):
    details = table([0, 5], [5, 5], tuple(map(str, range(count)))).details()
    assert len(details["per_class_top1"]) == count
    assert ("confusion" in details) == matrix


@pytest.fixture(scope="module")
def twelve_classes(photos, tmp_path_factory):
    """Patches of four photographs in twelve classes, so that three cannot be told apart; class 11 has no test image."""
    root = tmp_path_factory.mktemp("twelve")
    files, _ = patches(photos, 48, seed=4)
    write_split(root, files, [i % 12 for i in range(48)])
    write_split(root, files[:22], [i % 11 for i in range(22)], split="test")
    path = root / "test" / "manifest.json"
    train, test = Manifest.load(root, "train"), Manifest.load(root, "test")
    path.write_bytes(dataclasses.replace(test, classes=train.classes).to_bytes())
    return root


@pytest.mark.parametrize(
    "evaluator",
    [
        ["evaluator=knn"],
        ["evaluator=linear", "evaluator.epochs=2"],
        ["evaluator=linear_moco", "evaluator.batch_size=8"],
    ],
    ids=["knn", "linear", "linear_moco"],
)
def test_every_classifier_reports_by_class_in_the_file_the_csv_and_the_terminal(
    evaluator, twelve_classes, tmp_path, capsys
):
    places = ["checkpoint=pixels", "view.size=16", f"data.root={twelve_classes}", f"eval.out={tmp_path}/result.json"]
    metrics = run(load([*evaluator, *places]))
    result = json.loads((tmp_path / "result.json").read_text())
    with (tmp_path / "result-per-class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    top1 = metrics[f"{evaluator[0].removeprefix('evaluator=')}/top1"]
    assert sum(int(row["found"]) for row in rows) == pytest.approx(22 * top1)
    assert [row["top1"] != "" for row in rows] == [True] * 11 + [False]
    assert np.trace(result["confusion"]) == pytest.approx(22 * top1)
    assert np.sum(result["confusion"]) == 22
    assert result["per_class_top1"][11] is None
    printed = capsys.readouterr().out
    assert "best and worst classes" in printed
    shown = re.findall(r"(?m)^│ class (\d+) ", printed)
    assert len(set(shown)) == len(shown) == 10
