"""Which images to label next: each strategy on points where the answer is known, and the command's lists."""

import csv
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from PIL import Image

from fastssl.evaluate import main as evaluate
from fastssl.evaluate.registry import find
from fastssl.evaluate.select import GreyLevels, SelectSettings, excluded_ids
from fastssl.evaluate.settings import load
from fastssl.evaluate.strategies import (
    STRATEGIES,
    Pool,
    assign,
    choose,
    expected_classes,
    k_means,
    nearest,
    split_budget,
)
from fastssl.evaluate.subject import load_subject
from pipelines.augment import AugmentSpec
from pipelines.loader import read_once
from pipelines.views import ViewSpec, normalize
from shard_tools.cli import main as shard_tools
from shard_tools.manifest import Manifest
from tests.shards import encode

REPOSITORY = Path(__file__).resolve().parents[3]


def pool_of(points, labelled=(), num_clusters=0, temperature=0.1, seed=0):
    points = np.asarray(points, np.float32)
    none = np.zeros(0)
    found = (none, none, none)
    if num_clusters:
        found = assign(points, k_means(points, num_clusters, seed), temperature)
    return Pool(points, np.asarray(labelled, np.float32).reshape(-1, points.shape[1]), seed, *found)


def rows_of(chosen):
    return [choice.row for choice in chosen]


@pytest.fixture
def blobs(rng):
    """30, 20 and 10 points around three places, shuffled, and to which each belongs."""
    places = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    of = rng.permutation(np.repeat([0, 1, 2], [30, 20, 10]))
    return places[of] + 0.5 * rng.normal(size=(60, 2)), of


def test_centers_are_the_points_nearest_to_the_middle_of_each_blob(blobs):
    points, of = blobs
    chosen = choose(pool_of(points, num_clusters=3), {"centers": 3})
    assert of[rows_of(chosen)].tolist() == [0, 1, 2]  # larger clusters first
    for blob, choice in enumerate(chosen):
        members = np.flatnonzero(of == blob)
        apart = np.linalg.norm(points[members] - points[members].mean(0), axis=1)
        assert choice.row == members[apart.argmin()]
        assert choice.score == pytest.approx(apart.min(), rel=1e-5)


def test_centers_go_round_the_clusters_and_stop_at_those_that_are_used_up(blobs):
    points, of = blobs
    pool = pool_of(points, num_clusters=3)
    chosen = choose(pool, {"centers": 60})
    assert of[rows_of(chosen)[:9]].tolist() == [0, 1, 2] * 3
    assert of[rows_of(chosen)[30:]].tolist() == [0, 1] * 10 + [0] * 10
    assert sorted(rows_of(chosen)) == list(range(60))
    distances = [choice.score for choice in chosen if of[choice.row] == 1]
    assert distances == sorted(distances)


def test_edges_are_the_outliers(rng):
    outliers = np.array([[9.0, 0], [0, 12.0], [-15.0, 0], [0, -20.0]])
    points = np.concatenate([rng.normal(size=(50, 2)) * 0.3, outliers])
    chosen = choose(pool_of(points), {"edges": 4})
    assert sorted(rows_of(chosen)) == [50, 51, 52, 53]
    assert chosen[0].row == 53  # the farthest from the mean


@pytest.mark.parametrize("num_labelled", [0, 1, 4])
def test_edges_are_the_greedy_k_centres(rng, num_labelled):
    points, labelled = rng.normal(size=(40, 3)), rng.normal(size=(num_labelled, 3))
    chosen = choose(pool_of(points, labelled), {"edges": 12})
    known, expected, scores = [*labelled], [], []
    for _ in range(12):
        apart = [min(np.linalg.norm(p - q) for q in known or [points.mean(0)]) for p in points]
        apart = [-1 if i in expected else distance for i, distance in enumerate(apart)]
        expected.append(int(np.argmax(apart)))
        scores.append(max(apart))
        known.append(points[expected[-1]])
    assert rows_of(chosen) == expected
    assert_allclose([choice.score for choice in chosen], scores, rtol=1e-5)


def test_equal_points_are_still_chosen_once_each():
    assert sorted(rows_of(choose(pool_of(np.ones((6, 2))), {"edges": 6}))) == list(range(6))


def test_entropy_is_high_between_blobs_and_low_inside_them():
    line = np.linspace(-1, 1, 21)[:, None] * [1.0, 0.0]
    cluster, distance, entropy = assign(line, np.array([[-0.8, 0.0], [0.8, 0.0]]), 0.1)
    pool = Pool(line, np.zeros((0, 2)), 0, cluster, distance, entropy)
    assert rows_of(choose(pool, {"high_entropy": 3}))[0] == 10
    assert set(rows_of(choose(pool, {"high_entropy": 3}))) == {9, 10, 11}
    assert set(rows_of(choose(pool, {"low_entropy": 2}))) == {0, 20}
    assert entropy[10] == pytest.approx(np.log(2), rel=1e-12)


@pytest.mark.parametrize("temperature", [1e-3, 0.1, 50.0])
def test_assignment_is_the_softmax_of_squared_distances_in_units_of_their_own(rng, temperature):
    stats = pytest.importorskip("scipy.stats")
    points, centres = rng.normal(size=(1100, 4)), rng.normal(size=(6, 4))  # more than a chunk of points
    cluster, distance, entropy = assign(points, centres, temperature)
    apart = np.linalg.norm(points[:, None] - centres, axis=2)
    assert cluster.tolist() == apart.argmin(1).tolist()
    assert_allclose(distance, apart.min(1), rtol=1e-9)
    logits = -(apart**2) / (temperature * (apart.min(1) ** 2).mean())
    p = np.exp(logits - logits.max(1, keepdims=True))
    assert_allclose(entropy, stats.entropy(p, axis=1), rtol=1e-6, atol=1e-12)
    assert_allclose(nearest(points, centres), apart.min(1), rtol=1e-9)
    assert_allclose(assign(1e-3 * points, 1e-3 * centres, temperature)[2], entropy, rtol=1e-6, atol=1e-12)


def test_points_that_are_their_own_centres_have_no_entropy():
    cluster, distance, entropy = assign(np.eye(4), np.eye(4), 0.3)
    assert (cluster.tolist(), distance.tolist(), entropy.tolist()) == ([0, 1, 2, 3], [0.0] * 4, [0.0] * 4)


def test_the_spectrum_takes_one_of_each_part_of_the_order_of_entropy(blobs):
    pool = pool_of(blobs[0], num_clusters=3)
    order = np.argsort(pool.entropy, kind="stable").tolist()
    places = [order.index(row) for row in rows_of(choose(pool, {"spectrum": 6}))]
    assert [place // 10 for place in places] == list(range(6))
    other = pool_of(blobs[0], num_clusters=3, seed=1)
    assert rows_of(choose(other, {"spectrum": 6})) != rows_of(choose(pool, {"spectrum": 6}))


def test_random_is_fair_and_follows_the_seed():
    points = np.zeros((10, 1))
    counts = np.bincount(
        np.concatenate([rows_of(choose(pool_of(points, seed=seed), {"random": 3})) for seed in range(2000)]),
        minlength=10,
    )
    assert abs(counts - 600).max() < 4 * np.sqrt(2000 * 0.3 * 0.7)  # four standard deviations
    assert rows_of(choose(pool_of(points, seed=5), {"random": 9})) == rows_of(
        choose(pool_of(points, seed=5), {"random": 9})
    )


@given(
    counts=st.fixed_dictionaries({name: st.integers(0, 5) for name in STRATEGIES}),
    num_labelled=st.integers(0, 3),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_mixture_chooses_different_images_and_just_as_many_as_told(counts, num_labelled, seed):
    rng = np.random.default_rng(0)
    points, centres = rng.normal(size=(30, 3)), rng.normal(size=(4, 3))
    pool = Pool(points, rng.normal(size=(num_labelled, 3)), seed, *assign(points, centres, 0.5))
    chosen = choose(pool, {name: num for name, num in counts.items() if num})
    assert len(set(rows_of(chosen))) == len(chosen) == sum(counts.values())
    assert {name: sum(c.strategy == name for c in chosen) for name in counts} == counts
    assert rows_of(chosen) == rows_of(choose(pool, {name: num for name, num in counts.items() if num}))


@given(
    budget=st.integers(1, 1000),
    shares=st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda values: max(values) > 1e-3),
)
def test_shares_of_a_budget_are_whole_and_add_up(budget, shares):
    named = {str(i): share for i, share in enumerate(shares)}
    counts = split_budget(budget, named)
    assert sum(counts.values()) == budget
    for name, share in named.items():
        assert abs(counts.get(name, 0) - budget * share / sum(shares)) < 1 + 1e-6


def test_the_classes_that_chance_finds_are_the_mean_over_all_choices():
    labels = [0, 0, 0, 1, 1, 2, -1]  # one image without a label
    for num in range(1, 8):
        found = [len({labels[i] for i in some} - {-1}) for some in itertools.combinations(range(7), num)]
        assert expected_classes([3, 2, 1], 7, num) == pytest.approx(np.mean(found), rel=1e-12)


def test_more_clusters_than_different_features_is_a_sentence():
    with pytest.raises(ValueError, match=r"evaluator\.clusters is 5, but the features have fewer different values"):
        k_means(np.repeat(np.eye(3, dtype=np.float32), 4, axis=0), 5, 0)


def test_grey_levels_of_photographs_are_those_of_pillow(tiny_shards):
    measure = pytest.importorskip("skimage.measure")
    view = ViewSpec(
        role="test", size=24, crop="center", resize=27,
        augment=AugmentSpec(flip_p=0.0, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1)),
    )  # fmt: skip
    (batch,) = read_once(Manifest.load(tiny_shards), [view], batch_size=61, output="uint8")
    (pixels,) = batch.views["test"]
    found = GreyLevels(view, False)(normalize(pixels, view.augment.mean, view.augment.std, torch.float32))
    expected = [
        measure.shannon_entropy(np.asarray(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L")), base=2)
        for image in pixels
    ]
    assert_allclose(found[:, 0], expected, rtol=1e-6)
    assert np.ptp(expected) > 0.5


def test_grey_levels_of_stamps_are_of_their_picture():
    view = ViewSpec(
        role="test", size=8, crop="turned", turn_deg=0.0,
        augment=AugmentSpec(flip_p=0.0, stretch="log10", floor=1e-6, mean=(0.5,) * 4, std=(2.0,) * 4),
    )  # fmt: skip
    flat, half = torch.full((4, 8, 8), 3.0), torch.full((4, 8, 8), 3.0)
    half[:, :4] = 30.0
    images = (torch.stack([flat, half]).log10() - 0.5) / 2.0
    assert GreyLevels(view, True)(images)[:, 0].tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


# -- the command --


def settings_for(shards, out, *more):
    base = ["evaluator=select", "checkpoint=pixels", f"data.root={shards}", "view.size=16", "run.device=cpu"]
    return load([*base, f"eval.out={out}", "evaluator.budget=12", *more])


def keys(folder, name="select-pixels-centers-12"):
    return [int(line) for line in (folder / f"{name}-keys.txt").read_text().split()]


def test_the_command_needs_no_labels_and_leaves_table_list_and_sheet(tiny_shards_unlabelled, tmp_path, capsys):
    metrics = evaluate.run(settings_for(tiny_shards_unlabelled, tmp_path, "evaluator.strategy=mixed"))
    assert set(metrics) == {
        "select/mean_distance", "select/mean_distance_random", "select/largest_distance",
        "select/largest_distance_random",
    }  # fmt: skip
    with (tmp_path / "select-pixels-mixed-12-list.csv").open() as file:
        rows = list(csv.DictReader(file))
    ids = keys(tmp_path, "select-pixels-mixed-12")
    assert [int(row["id"]) for row in rows] == ids
    assert [int(row["rank"]) for row in rows] == list(range(1, 13))
    assert len(set(ids)) == 12
    assert [row["strategy"] for row in rows] == (
        ["centers"] * 6 + ["edges"] + ["low_entropy"] + ["high_entropy"] * 3 + ["random"]
    )  # 6, 1.2, 1.2, 2.4, 0, 1.2: the largest remainder is that of high_entropy
    assert rows[0]["member"] == Manifest.load(tiny_shards_unlabelled).member_name(ids[0])
    assert {row["name"] for row in rows} == {""}  # these shards have no .json members
    written = json.loads((tmp_path / "select-pixels.json").read_text())
    assert written["selected"] == ids
    assert written["files"] == [f"select-pixels-mixed-12-{end}" for end in ("keys.txt", "list.csv", "sheet.png")]
    with Image.open(tmp_path / "select-pixels-mixed-12-sheet.png") as sheet:
        assert sheet.width > 500
    assert "6 centers, 1 edges, 1 low_entropy, 3 high_entropy, 1 random" in capsys.readouterr().out


def test_the_same_command_gives_the_same_files_and_another_seed_other_ones(tiny_shards, tmp_path):
    for folder, seed in (("one", 0), ("two", 0), ("other", 1)):
        for more in ("evaluator.strategy=mixed", "evaluator.strategy=centers"):
            evaluate.run(settings_for(tiny_shards, tmp_path / folder, more, f"run.seed={seed}"))
    names = [path.name for path in sorted((tmp_path / "one").iterdir()) if path.suffix != ".json"]
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert keys(tmp_path / "one") != keys(tmp_path / "other")


def test_another_selection_never_replaces_a_list(tiny_shards_unlabelled, tmp_path):
    evaluate.run(settings_for(tiny_shards_unlabelled, tmp_path))
    before = keys(tmp_path)
    evaluate.run(settings_for(tiny_shards_unlabelled, tmp_path))  # the same again
    exclude = f"evaluator.exclude={tmp_path}/select-pixels-centers-12-keys.txt"
    with pytest.raises(ValueError, match=r"keys\.txt holds another selection already; give eval\.out=FOLDER"):
        evaluate.run(settings_for(tiny_shards_unlabelled, tmp_path, exclude))
    assert keys(tmp_path) == before


def test_rounds_of_labelling_never_choose_an_image_twice(tiny_shards_unlabelled, tmp_path):
    labelled: set[int] = set()
    for number, strategy in enumerate(["centers", "edges", "high_entropy", "random", "spectrum"]):
        (tmp_path / "labelled.txt").write_text("".join(f"{i}\n" for i in labelled) + "\n")
        exclude = f"evaluator.exclude={tmp_path}/labelled.txt"
        out = tmp_path / str(number)
        evaluate.run(settings_for(tiny_shards_unlabelled, out, exclude, f"evaluator.strategy={strategy}"))
        chosen = keys(out, f"select-pixels-{strategy}-12")
        assert not labelled & set(chosen)
        labelled |= set(chosen)
    assert len(labelled) == 60
    (tmp_path / "labelled.txt").write_text("\n".join(map(str, labelled)))
    with pytest.raises(ValueError, match=r"budget is 12, but must be at most the 1 images .* not excluded"):
        evaluate.run(settings_for(tiny_shards_unlabelled, tmp_path / "x", exclude))


def test_labelled_data_reports_the_classes_found(tiny_shards, tmp_path, capsys):
    metrics = evaluate.run(settings_for(tiny_shards, tmp_path, "evaluator.budget=3", "evaluator.strategy=random"))
    labels = Manifest.load(tiny_shards).index()["label"]
    chosen = keys(tmp_path, "select-pixels-random-3")
    assert metrics["select/classes_covered"] == len(set(labels[chosen])) / 4
    assert metrics["select/classes_covered_random"] == expected_classes(np.bincount(labels), 61, 3) / 4
    assert metrics["select/mean_distance"] == metrics["select/mean_distance_random"]  # chance is this very draw
    assert "of 4" in capsys.readouterr().out


def test_grey_levels_rank_the_images_themselves(tiny_shards_unlabelled, tmp_path):
    more = ["evaluator.entropy=grey_levels", "evaluator.strategy=low_entropy"]
    cfg = settings_for(tiny_shards_unlabelled, tmp_path, *more)
    evaluate.run(cfg)
    view = load_subject(cfg).view
    (batch,) = read_once(Manifest.load(tiny_shards_unlabelled), [view], batch_size=61, output="uint8")
    pixels = normalize(batch.views["test"][0], view.augment.mean, view.augment.std, torch.float32)
    entropy = GreyLevels(view, False)(pixels)[:, 0]
    assert keys(tmp_path, "select-pixels-low_entropy-12") == entropy.sort(stable=True).indices[:12].tolist()


@pytest.fixture
def packed(photos, tmp_path):
    """30 images in a folder, packed with their names, two of which have the same file name in different folders."""
    for i in range(30):
        folder = tmp_path / "images" / ("a" if i < 15 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        left, top = 10 * i, 5 * i
        photos[i % 4].crop((left, top, left + 60, top + 60)).save(folder / f"image {i % 29}.png")
    assert shard_tools(["pack", "files", str(tmp_path / "images"), str(tmp_path / "shards"), "--workers", "1"]) == 0
    return tmp_path / "shards"


def test_the_lists_are_what_shard_tools_takes(packed, tmp_path):
    evaluate.run(settings_for(packed, tmp_path / "out"))
    stem = tmp_path / "out" / "select-pixels-centers-12"
    source, again, out = (str(tmp_path / name) for name in ("images", "again", "extracted"))
    subset = ["pack", "files", source, again, "--subset-file", f"{stem}-names.txt", "--workers", "1"]
    assert shard_tools(subset) == 0
    chosen = keys(tmp_path / "out")
    assert shard_tools(["extract", str(packed), "--keys", *map(str, chosen), out]) == 0

    def images(manifest, rows):
        index = manifest.index()[rows]
        return sorted(index["crc32"].tolist())

    assert images(Manifest.load(again), slice(None)) == images(Manifest.load(packed), chosen)
    assert [int(path.name[:9]) for path in sorted(Path(out).iterdir())] == sorted(chosen)


def test_excluded_samples_may_be_named(packed, tmp_path):
    manifest = Manifest.load(packed)
    evaluate.run(settings_for(packed, tmp_path / "out", "evaluator.budget=30"))
    with (tmp_path / "out" / "select-pixels-centers-30-list.csv").open() as file:
        id_of = {row["name"]: int(row["id"]) for row in csv.DictReader(file)}
    (tmp_path / "done.txt").write_text("a/image 3.png\n\n 7 \nimage 0.png\n")
    both = {id_of["a/image 0.png"], id_of["b/image 0.png"]}  # a file name stands for all that have it
    assert excluded_ids(str(tmp_path / "done.txt"), manifest) == {id_of["a/image 3.png"], 7, *both}
    assert excluded_ids("", manifest) == set()


@pytest.mark.parametrize("name", ["two\nlines.png", " blank.png", "no character \ud800.png", 7])
def test_names_that_no_list_can_hold_leave_the_ids(name, tmp_path):
    with tarfile.open(tmp_path / "train-000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in range(3):
            meta = json.dumps({"name": name if i == 1 else f"caf\udce9 {i}.png"}).encode()
            for suffix, content in (("png", encode(Image.new("RGB", (20, 20), (9 * i, 0, 0)), "png")), ("json", meta)):
                member = tarfile.TarInfo(f"{i:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert shard_tools(["index", str(tmp_path), "--workers", "1"]) == 0
    evaluate.run(settings_for(tmp_path, tmp_path / "out", "evaluator.budget=3", "evaluator.strategy=random"))
    names = (tmp_path / "out" / "select-pixels-random-3-list.csv").read_bytes().decode(errors="surrogateescape")
    assert sorted(line.split(",")[3] for line in names.splitlines()[1:]) == ["", "caf\udce9 0.png", "caf\udce9 2.png"]
    assert len(keys(tmp_path / "out", "select-pixels-random-3")) == 3
    assert not list((tmp_path / "out").glob("*names.txt"))


FAULTS = {
    "budget beyond the data": (["evaluator.budget=62"], r"evaluator\.budget is 62, .*at most the 61 images"),
    "budget of none": (["evaluator.budget=0"], r"evaluator\.budget is 0"),
    "clusters beyond the data": (["evaluator.clusters=62"], r"evaluator\.clusters is 62, .*at most the 61"),
    "no such list": (["evaluator.exclude=/nowhere.txt"], r"evaluator\.exclude is '/nowhere.txt', which cannot be read"),
    "unknown id": (["evaluator.exclude={folder}/id.txt"], r"names sample 61, but .* ends at 60"),
    "unknown name": (["evaluator.exclude={folder}/name.txt"], r"names 1 samples that .* does not hold.* 'x.jpg'"),
    "no temperature": (["evaluator.temperature=0"], r"evaluator\.temperature is 0\.0"),
    "no share": (["evaluator.strategy=mixed", "evaluator.shares={{centers: 0, edges: 0, low_entropy: 0, "
                  "high_entropy: 0, random: 0}}"], r"evaluator\.shares is .* one above 0"),
    "negative share": (["evaluator.shares.edges=-1"], r"evaluator\.shares is .* 0 or more each"),
    "misspelt share": (["evaluator.shares.edge=1"], r"evaluator\.shares\.edge"),
    "unknown strategy": (["evaluator.strategy=best"], r"evaluator\.strategy is 'best'"),
    "nowhere to write": (["eval.out="], r"give eval\.out=FOLDER"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_sentence_and_exit_code_2(fault, tiny_shards_unlabelled, tmp_path, capsys):
    (tmp_path / "id.txt").write_text("61\n")
    (tmp_path / "name.txt").write_text("x.jpg\n")
    overrides, message = FAULTS[fault]
    base = ["evaluator=select", "checkpoint=pixels", f"data.root={tiny_shards_unlabelled}", "view.size=16"]
    overrides = [override.format(folder=tmp_path) for override in overrides]
    code = evaluate.main([*base, f"eval.out={tmp_path}/out", "evaluator.budget=5", "run.device=cpu", *overrides])
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_without_scikit_learn_the_remedy_is_the_extra(tiny_shards_unlabelled, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    with pytest.raises(ValueError, match=r"needs scikit-learn; install fastssl-train\[eval\]"):
        evaluate.run(settings_for(tiny_shards_unlabelled, tmp_path))


def test_the_preset_is_the_dataclass():
    settings = find(load(["evaluator=select", "checkpoint=pixels", "data.root=X"]))[1]
    assert settings.counts() == {"centers": settings.budget}
    assert set(settings.shares) == set(STRATEGIES)
    mixed = SelectSettings("select", 10, "mixed", {"edges": 1, "random": 3})
    assert mixed.counts() == {"edges": 3, "random": 7}  # 2.5 and 7.5: of equal remainders the first strategy's


@pytest.mark.dist
def test_two_ranks_choose_what_one_chooses(run_dir, patch_shards, tmp_path):
    overrides = ["evaluator=select", f"checkpoint={run_dir}", f"data.root={patch_shards}", "run.batch_size=20",
                 "evaluator.budget=15", "evaluator.strategy=mixed", "run.device=cpu"]  # fmt: skip
    alone = evaluate.run(load([*overrides, f"eval.out={tmp_path}/alone"]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "fastssl.evaluate", *overrides, f"eval.out={tmp_path}/two"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "select-step-00000007.json").read_text()) for name in ("alone", "two"))
    # Each rank has fewer threads than one process, which changes the last bits of float32 features.
    assert two["metrics"] == pytest.approx(alone, rel=1e-6)
    assert one["selected"] == two["selected"]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"select-step-00000007.json", *one["files"]}
    lists = [(tmp_path / name / "select-step-00000007-mixed-15-keys.txt").read_bytes() for name in ("alone", "two")]
    assert lists[0] == lists[1]
