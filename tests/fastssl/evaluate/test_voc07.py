"""VOC07: average precision against its definition and scikit-learn, the SVM protocol, and the commands on shards."""

import json

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import LinearSVC

from fastssl.evaluate import main as evaluate
from fastssl.evaluate import svm
from fastssl.evaluate.average_precision import average_precision, of_ranking
from fastssl.evaluate.settings import load
from fastssl.evaluate.voc07 import trainval_and_test
from shard_tools.manifest import Manifest, ShardError
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import voc07 as source
from tests.fastssl.runs import evaluate_on_two_ranks
from tests.oracle import average_precision as oracle
from tests.voc import devkit


def ranking(rng, num, ties=False):
    """Scores that tell something, and labels with all three values."""
    labels = rng.choice([-1, 0, 1], num, p=[0.1, 0.6, 0.3])
    labels[0] = 1
    scores = rng.normal(size=num) + (labels == 1)
    return np.round(scores) if ties else scores, labels


@pytest.mark.parametrize("num", [1, 2, 10, 11, 137])
@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_that_of_the_devkit(rng, num, ties):
    for _ in range(5):
        scores, labels = ranking(rng, num, ties)
        kept, truth = oracle.without_difficult(scores, labels)
        points = oracle.curve(kept, truth, sum(truth))
        found = average_precision(scores, labels)
        assert_allclose(
            [found.area, found.eleven_point], [oracle.area(points), oracle.eleven_point(points)], rtol=1e-13
        )


def test_the_uninterpolated_form_is_scikit_learns_where_no_scores_are_equal(rng):
    for num in (3, 50, 400):
        scores, labels = ranking(rng, num)
        kept, truth = oracle.without_difficult(scores, labels)
        found = average_precision(scores, labels)
        assert found.uninterpolated == pytest.approx(average_precision_score(truth, kept), rel=1e-13)
        assert found.area >= found.uninterpolated


def test_a_recall_of_exactly_three_tenths_counts_as_reached():
    hits = np.array([True] * 3 + [False] * 7 + [True] * 7)  # of 10 positives, 3 before anything else
    assert of_ranking(hits, 10).eleven_point == pytest.approx((4 + 7 * 10 / 17) / 11, rel=1e-13)


def test_positives_that_no_entry_finds_count_as_recall_that_is_not_reached():
    found = of_ranking(np.array([True, False, True]), 4)
    points = oracle.curve([3, 2, 1], [True, False, True], 4)
    assert (found.area, found.eleven_point) == pytest.approx((oracle.area(points), oracle.eleven_point(points)))
    assert (found.area, found.uninterpolated) == pytest.approx(((1 + 2 / 3) / 4, (1 + 2 / 3) / 4))


def test_average_precision_without_a_positive_is_refused():
    with pytest.raises(ValueError, match="nothing is positive"):
        average_precision([0.1, 0.2], [0, -1])


# ---- the protocol on arrays


def clouds(rng, num, noise, num_classes=3, width=12):
    """Features around a mean of each class an image shows, and labels with difficult ones."""
    present = rng.random((num, num_classes)) < 0.35
    features = present @ rng.normal(size=(num_classes, width)) + noise * rng.normal(size=(num, width))
    labels = present.astype(np.int8)
    labels[(rng.random((num, num_classes)) < 0.1) & ~present] = -1
    return svm.unit_length(features), labels


def stated(train, y, test, costs):
    """VISSL's protocol said with scikit-learn alone: (scores, cost, mean AP of each cost over three folds)."""

    def model(cost):
        return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)

    held_out = []
    for cost in costs:
        aps = []
        for fit, judge in StratifiedKFold(3).split(train, y):
            scores = model(cost).fit(train[fit], y[fit]).decision_function(train[judge])
            aps.append(average_precision_score(y[judge] == 1, scores))
        held_out.append(sum(aps) / 3)
    cost = costs[int(np.argmax(held_out))]
    return model(cost).fit(train, y).decision_function(test), cost, held_out


@pytest.mark.parametrize("noise", [0.1, 1.5])
@pytest.mark.parametrize("difficult", ["negative", "ignored"])
def test_a_class_is_fitted_as_the_protocol_says(rng, noise, difficult):
    train, labels = clouds(rng, 150, noise)
    test, _ = clouds(rng, 40, noise)
    protocol = svm.SvmProtocol((0.01, 0.5, 2.0), difficult=difficult)
    for number in range(3):
        mine = labels[:, number]
        rows = np.ones(len(mine), bool) if difficult == "negative" else mine != -1
        scores, cost, held_out = stated(train[rows], np.where(mine[rows] == 1, 1, -1), test, protocol.costs)
        found = svm.fit_class(train, mine, test, protocol)
        assert found.cost == cost
        assert_allclose(found.held_out, held_out, rtol=1e-12)
        assert_allclose(found.scores, scores, rtol=1e-12)
        assert found.num_unconverged == 0


def test_separable_classes_reach_an_ap_of_one_and_pure_noise_the_share_of_positives(rng):
    for noise, low, high in ((0.02, 0.999, 1.0), (1000.0, 0.15, 0.6)):
        features, labels = clouds(rng, 300, noise, num_classes=2)
        found = svm.fit_class(features[:200], labels[:200, 0], features[200:], svm.SvmProtocol((1.0, 100.0)))
        assert low <= average_precision(found.scores, labels[200:, 0]).area <= high


def test_fits_that_are_cut_off_are_counted_and_warn_nobody(rng):
    train, labels = clouds(rng, 80, 2.0)
    found = svm.fit_class(train, labels[:, 0], train, svm.SvmProtocol((1.0, 1000.0), max_iter=2))
    assert found.num_unconverged == 2 * 3 + 1


def test_rows_have_unit_length_up_to_the_constant():
    assert_allclose(svm.unit_length([[3.0, 4.0], [0.0, 0.0]]), [[3 / 5.00001, 4 / 5.00001], [0, 0]], rtol=1e-15)


def test_a_low_shot_draw_has_k_positives_and_k_negatives_for_each_other_class(rng):
    labels = rng.choice(np.array([-1, 0, 1], np.int8), 500, p=[0.1, 0.8, 0.1])
    drawn = {d: svm.low_shot_rows(labels, 4, 20, (0, d, 2)) for d in range(5)}
    for rows in drawn.values():
        assert (labels[rows] == 1).sum() == 4
        assert (labels[rows] == 0).sum() == 76
        assert len(set(rows.tolist())) == 80
    assert len({tuple(rows) for rows in drawn.values()}) == 5
    assert_array_equal(drawn[3], svm.low_shot_rows(labels, 4, 20, (0, 3, 2)))
    with pytest.raises(ValueError, match=r"only .* show it, but k = 90 needs 90"):
        svm.low_shot_rows(labels, 90, 20, (0, 0, 0))


def test_low_shot_fits_each_draw_with_each_cost(rng):
    train, labels = clouds(rng, 200, 0.8)
    test, test_labels = clouds(rng, 60, 0.8)
    draws = [svm.low_shot_rows(labels[:, 0], k, 3, (0, 0, 0)) for k in (2, 8)]
    aps, cut = svm.low_shot_aps(train, labels[:, 0], test, test_labels[:, 0], draws, svm.SvmProtocol((0.1, 10.0)))
    for d, rows in enumerate(draws):
        for v, cost in enumerate((0.1, 10.0)):
            model = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, max_iter=2000, random_state=0)
            scores = model.fit(train[rows], np.where(labels[rows, 0] == 1, 1, -1)).decision_function(test)
            points = oracle.curve(*(kept := oracle.without_difficult(scores, test_labels[:, 0])), sum(kept[1]))
            assert aps[d, v] == pytest.approx(oracle.area(points), rel=1e-12)
    assert cut == 0


# ---- the commands on shards


@pytest.fixture(scope="module")
def voc_shards(tmp_path_factory):
    """100 images in trainval, 40 in test, of 40 x 30 px; every class in 6 images or more."""
    src = devkit(tmp_path_factory.mktemp("voc") / "VOC2007", train=60, val=40, test=40)
    dst = tmp_path_factory.mktemp("voc_shards")
    for split in source.SPLITS:
        pack(source.open_source(src, split), dst, PackOptions(shard_size=30))
    return dst


SMALL = ["checkpoint=pixels", "view.size=24", "run.device=cpu", "evaluator.jobs=1"]


def small(shards, name="voc07", *more):
    costs = "evaluator.costs=[0.1,10.0]"
    return [f"evaluator={name}", *SMALL, costs, f"data.root={shards}", *more]


def test_the_command_is_the_protocol_on_trainval_and_test(voc_shards, tmp_path, capsys):
    overrides = small(voc_shards, "voc07", f"eval.out={tmp_path}/voc.json")
    metrics = evaluate.run(load(overrides))
    from fastssl.evaluate.features import features_of
    from fastssl.evaluate.subject import load_subject

    subject = load_subject(load(overrides))
    arrays = []
    for split in ("trainval", "test"):
        manifest = Manifest.load(voc_shards, split)
        features = features_of(subject.backbone, manifest, subject.view).features.double().numpy()
        arrays += [features / (np.sqrt((features**2).sum(1, keepdims=True)) + 1e-5), manifest.labels()]
    train, labels, test, test_labels = arrays
    areas, elevens = [], []
    for number in range(20):
        scores, _, _ = stated(train, np.where(labels[:, number] == 1, 1, -1), test, (0.1, 10.0))
        points = oracle.curve(*(kept := oracle.without_difficult(scores, test_labels[:, number])), sum(kept[1]))
        areas.append(oracle.area(points))
        elevens.append(oracle.eleven_point(points))
    assert metrics["voc07/map"] == pytest.approx(np.mean(areas), rel=1e-9)
    assert metrics["voc07/map_11point"] == pytest.approx(np.mean(elevens), rel=1e-9)
    written = json.loads((tmp_path / "voc.json").read_text())
    assert [entry["area"] for entry in written["per_class"].values()] == pytest.approx(areas, rel=1e-9)
    printed = capsys.readouterr().out
    assert "aeroplane" in printed
    assert "100 images of trainval and 40 of test, 20 classes" in written["protocol"]


@pytest.mark.dist
def test_processes_and_ranks_do_not_change_a_bit_of_the_result(voc_shards, tmp_path):
    cases = {
        "voc07": small(voc_shards),
        "voc07_lowshot": small(voc_shards, "voc07_lowshot", "evaluator.k=[2]", "evaluator.costs=[1.0]"),
    }
    alone = {name: evaluate.run(load(case)) for name, case in cases.items()}
    cases["voc07"].append("evaluator.jobs=2")
    two = evaluate_on_two_ranks(cases, tmp_path)
    assert {name: result["metrics"] for name, result in two.items()} == alone


def test_low_shot_reports_mean_and_spread_of_every_k(voc_shards, tmp_path):
    overrides = small(voc_shards, "voc07_lowshot", "evaluator.k=[1,2]", "evaluator.draws=3", "evaluator.cost=10.0")
    metrics = evaluate.run(load([*overrides, f"eval.out={tmp_path}/low.json"]))
    maps = np.array(json.loads((tmp_path / "low.json").read_text())["map_of_k_draw_cost"])
    assert maps.shape == (2, 3, 2)
    for number, k in enumerate((1, 2)):
        assert metrics[f"voc07_lowshot/k{k}/map"] == pytest.approx(maps[number, :, 1].mean())
        assert metrics[f"voc07_lowshot/k{k}/map_std"] == pytest.approx(maps[number, :, 1].std())
        best = maps[number].mean(0).max()
        assert metrics[f"voc07_lowshot/k{k}/map_cost_chosen_on_test"] == pytest.approx(best)


def test_the_default_split_means_trainval_and_its_own_folder_the_half(voc_shards):
    for where, expected in ((voc_shards, "trainval"), (voc_shards / "train", "train")):
        cfg = load([*small(voc_shards), f"data.root={where}", f"data.test_root={voc_shards}"])
        assert [m.split for m in trainval_and_test(cfg)] == [expected, "test"]


def test_what_cannot_be_evaluated_is_said_in_one_sentence(voc_shards, tiny_shards):
    with pytest.raises(ShardError, match="not several labels an image; pack VOC with"):
        evaluate.run(load(small(voc_shards, "voc07", f"data.test_root={tiny_shards}", "data.test_split=train")))
    with pytest.raises(ValueError, match="no labels, which an evaluator needs"):
        evaluate.run(load(["evaluator=knn", "checkpoint=pixels", f"data.root={voc_shards}", "view.size=16"]))
    with pytest.raises(ValueError, match=r"show the class '\w+', but 3 must; pack more images, or raise data.limit"):
        evaluate.run(load(small(voc_shards, "voc07", "data.limit=12")))
    with pytest.raises(ValueError, match=r"only 1?\d training images show it, but k = 20 needs 20; lower evaluator"):
        evaluate.run(load(small(voc_shards, "voc07_lowshot", "evaluator.cost=10.0", "evaluator.k=[1,20]")))
    with pytest.raises(ValueError, match=r"evaluator.cost is 3.0, but must be one of evaluator.costs"):
        load(small(voc_shards, "voc07_lowshot", "evaluator.cost=3.0"))
