import copy
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastssl import checkpoint, dist
from fastssl.evaluate.features import Features
from fastssl.evaluate.finetune import (
    Classifier,
    FinetuneSettings,
    finetune,
    rows_of_names,
    rows_of_share,
    subset_batches,
)
from fastssl.evaluate.main import main, run
from fastssl.evaluate.registry import find
from fastssl.evaluate.settings import load
from pipelines.augment import AugmentSpec
from pipelines.loader import Loader
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import imagefolder
from tests.fastssl.evaluate.test_linear import FakeLoader, TinyBackbone
from tests.fastssl.runs import evaluate_on_two_ranks
from tests.shards import encode, write_split

SHORT = FinetuneSettings(
    "finetune_1pct", lr=0.01, head_lr=0.1, share=1.0, epochs=3, milestones=(1, 2), weight_decay=0.01, batch_size=8
)
SMALL_RUN = ["evaluator.epochs=2", "evaluator.batch_size=8", "evaluator.lr=0.01", "evaluator.head_lr=0.1"]


def preset(name):
    return find(load([f"evaluator={name}", "checkpoint=pixels", "data.root=X"]))[1]


# -- the protocol --


def test_presets_hold_the_published_values():
    one, ten = preset("finetune_1pct"), preset("finetune_10pct")
    assert (one.lr, one.head_lr, one.share) == (0.02, 5.0, 0.01)
    assert (ten.lr, ten.head_lr, ten.share) == (0.01, 0.2, 0.1)
    for protocol in (one, ten):
        assert (protocol.weight_decay, protocol.momentum, protocol.epochs, protocol.batch_size) == (0.0, 0.9, 20, 256)
        assert (protocol.scale, protocol.flip_p, protocol.batch_norm) == ((0.08, 1.0), 0.5, "sync")
    assert [ten.lrs_at(e) for e in (0, 11, 12, 15, 16, 19)] == [
        pytest.approx(pair) for pair in [(0.01, 0.2)] * 2 + [(0.002, 0.04)] * 2 + [(0.0004, 0.008)] * 2
    ]
    assert replace(ten, batch_size=512).lrs_at(0) == (0.01, 0.2)
    assert replace(ten, batch_size=512, scale_lr=True).lrs_at(0) == (0.02, 0.4)
    full = preset("finetune_full")
    assert replace(full, name="finetune_10pct", share=0.1) == ten
    assert full.share == 1.0


def test_fine_tuning_is_the_plain_loop_of_the_protocol(rng):
    """Weights, batch norm and losses after three epochs, against torch's own schedule and cross-entropy."""
    torch.manual_seed(7)
    loader, model = FakeLoader(rng), Classifier(TinyBackbone(), 3, seed=4)
    plain = copy.deepcopy(model)
    test = Features(torch.randn(9, 12), torch.arange(9) % 3, torch.arange(9))
    result = finetune(
        model, loader.batches(), lambda backbone: test, steps_per_epoch=3, settings=SHORT, mean=(0.5,) * 3,
        std=(0.25,) * 3,
    )  # fmt: skip
    optimizer = torch.optim.SGD(
        [{"params": plain.backbone.parameters()}, {"params": plain.head.parameters(), "lr": 0.1}],
        lr=0.01, momentum=0.9, weight_decay=0.01,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.2)
    plain.train()
    for expected in result.losses:
        losses = []
        for batch in loader.data:
            x = (batch.views["train"][0].float() / 255 - 0.5) / 0.25
            loss = nn.functional.cross_entropy(plain.head(plain.backbone(x)), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        assert expected == pytest.approx(np.mean(losses), rel=1e-4)  # float32, another memory format
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_the_layer_starts_as_torchs_do_whatever_the_global_seed():
    torch.manual_seed(1)
    first = Classifier(TinyBackbone(), 50, seed=5).head
    torch.manual_seed(2)
    again = Classifier(TinyBackbone(), 50, seed=5).head
    other = Classifier(TinyBackbone(), 50, seed=6).head
    assert torch.equal(first.weight, again.weight)
    assert not torch.equal(first.weight, other.weight)
    bound = 12**-0.5  # nn.Linear's: uniform in +-1/sqrt(F), for the bias as well
    assert 0.9 * bound < float(first.weight.detach().abs().max()) <= bound
    assert 0.5 * bound < float(first.bias.detach().abs().max()) <= bound


def test_every_layer_learns_and_the_modes_are_those_of_training(rng):
    torch.manual_seed(7)
    model = Classifier(TinyBackbone(), 3, seed=4)
    before = copy.deepcopy(model.state_dict())
    modes = []

    def test(backbone):
        modes.append(backbone.training)
        return Features(torch.randn(3, 12), torch.arange(3), torch.arange(3))

    finetune(
        model, FakeLoader(rng).batches(), test, steps_per_epoch=3, settings=SHORT, mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    same = [key for key, value in model.state_dict().items() if torch.equal(value, before[key])]
    assert same == []
    assert modes == [False] * 3
    assert model.backbone.bn.training


def test_the_test_sees_the_statistics_of_rank_0_on_every_rank(rng, monkeypatch):
    """Ranks share the test images, so that a rank's own statistics would give each image another model."""
    monkeypatch.setattr(dist, "all_gather", lambda x: torch.cat([torch.full_like(x, 7), x]))
    seen = []

    def test(backbone):
        seen.append([buffer.unique().tolist() for buffer in backbone.buffers()])
        return Features(torch.randn(3, 12), torch.arange(3), torch.arange(3))

    settings = replace(SHORT, batch_norm="plain", epochs=1)
    finetune(
        Classifier(TinyBackbone(), 3, seed=4), FakeLoader(rng).batches(), test, steps_per_epoch=3, settings=settings,
        mean=(0.5,) * 3, std=(0.25,) * 3,
    )  # fmt: skip
    assert seen == [[[7]] * 3]


def test_a_loss_that_is_not_finite_says_which_settings_to_lower(rng):
    model = Classifier(TinyBackbone(), 3, seed=4)
    with pytest.raises(ValueError, match=r"loss of fine-tuning is .* lower evaluator\.lr=1e\+30 and"):
        finetune(
            model, FakeLoader(rng).batches(), lambda backbone: None, steps_per_epoch=3,
            settings=replace(SHORT, lr=1e30), mean=(0.5,) * 3, std=(0.25,) * 3,
        )  # fmt: skip


# -- which images --


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=120), st.floats(0.001, 1.0), st.integers(0, 99))
def test_a_share_is_that_of_every_class_and_one_image_at_least(labels, share, seed):
    labels = np.array(labels)
    rows = rows_of_share(labels, share, seed)
    assert rows.tolist() == sorted(set(rows.tolist()))
    for c in np.unique(labels):
        total, count = (labels == c).sum(), (labels[rows] == c).sum()
        assert count == max(1, round(share * total))
    assert np.array_equal(rows, rows_of_share(labels, share, seed))


def test_the_images_of_a_share_hang_on_the_seed_and_not_on_other_classes():
    labels = np.arange(200) % 4
    first, other = rows_of_share(labels, 0.1, 0), rows_of_share(labels, 0.1, 1)
    assert first.tolist() != other.tolist()
    fewer = np.where(labels == 3, 2, labels)  # class 3 joins class 2
    same = rows_of_share(fewer, 0.1, 0)
    assert [r for r in first if labels[r] < 2] == [r for r in same if labels[r] < 2]


@pytest.fixture(scope="module")
def named_shards(photos, tmp_path_factory):
    """Packed from folders: cat/cat_0.jpg ... cat_5.jpg, dog/dog_0.jpg ..., and odd.jpg in both."""
    src = tmp_path_factory.mktemp("named")
    for c, name in enumerate(("cat", "dog")):
        (src / name).mkdir()
        for i in range(6):
            (src / name / f"{name}_{i}.jpg").write_bytes(encode(photos[c].resize((40 + i, 40))))
        (src / name / "odd.jpg").write_bytes(encode(photos[c].resize((60, 60))))
    pack(imagefolder.open_source(src, "train"), src / "shards", PackOptions())
    return src / "shards"


def test_a_list_of_names_finds_the_images_that_were_packed_from_these_files(named_shards):
    manifest = Manifest.load(named_shards)
    rows = rows_of_names(manifest, ["dog_3.jpg", "cat/cat_5.jpg", "cat/odd.jpg"], "list")
    sizes = [(int(r["label"]), int(r["width"])) for r in manifest.index()[rows]]
    assert sorted(sizes) == [(0, 45), (0, 60), (1, 43)]


@pytest.mark.parametrize(
    ("name", "message"),
    [("owl_1.jpg", r"list names 'owl_1\.jpg', but .* has none"), ("odd.jpg", "but 2 images of .* have that name")],
)
def test_names_that_no_image_or_several_have_are_refused(named_shards, name, message):
    with pytest.raises(ValueError, match=message):
        rows_of_names(Manifest.load(named_shards), ["dog_3.jpg", name], "list")


def spec():
    return ViewSpec(role="train", size=16, scale=(0.08, 1.0), augment=AugmentSpec())


def test_batches_of_all_rows_are_the_loaders_own_bit_for_bit(tiny_shards):
    manifest = Manifest.load(tiny_shards)
    ours = subset_batches(manifest, spec(), np.arange(61), batch_size=20, seed=3)
    with Loader(manifest, [spec()], batch_size=20, seed=3) as loader:
        for batch, expected in itertools.islice(zip(ours, loader.batches()), 7):  # into the third epoch
            assert torch.equal(batch.ids, expected.ids)
            assert torch.equal(batch.labels, expected.labels)
            assert torch.equal(batch.views["train"][0], expected.views["train"][0])
    ours.close()


def test_only_the_chosen_images_are_seen_each_once_an_epoch(tiny_shards):
    rows = np.array([3, 10, 11, 40, 60])
    batches = subset_batches(Manifest.load(tiny_shards), spec(), rows, batch_size=2, seed=3)
    epochs = [[next(batches) for _ in range(2)] for _ in range(6)]
    batches.close()
    seen = [torch.cat([batch.ids for batch in epoch]).tolist() for epoch in epochs]
    assert all(len(set(ids)) == 4 and set(ids) <= set(rows.tolist()) for ids in seen)
    assert {i for ids in seen for i in ids} == set(rows.tolist())  # the one left out is not always the same
    assert len({tuple(ids) for ids in seen}) > 1


# -- the whole evaluator --


def test_fine_tuning_reports_last_and_best_and_leaves_the_checkpoint_alone(run_dir, patch_shards, capsys):
    folder = run_dir / "checkpoints" / "step-00000007"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    overrides = ["evaluator=finetune_10pct", *SMALL_RUN, "evaluator.share=0.4", f"checkpoint={run_dir}"]
    metrics = run(load([*overrides, f"data.root={patch_shards}"]))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    result = json.loads((run_dir / "evaluation" / "finetune_10pct-step-00000007.json").read_text())
    assert result["metrics"] == metrics
    keys = ("top1", "top5", "best_top1_chosen_on_test", "loss")
    assert set(metrics) == {f"finetune_10pct/{key}" for key in keys}
    assert metrics["finetune_10pct/best_top1_chosen_on_test"] >= metrics["finetune_10pct/top1"]
    assert result["subset"]["images"] == 24  # 0.4 of 16, 15, 15 and 15
    assert np.trace(result["confusion"]) == pytest.approx(31 * metrics["finetune_10pct/top1"])
    printed = capsys.readouterr().out
    for part in ("40 % of each class drawn by seed 0", "24 images of train and 31 of test", "x0.2 at [12, 16]",
                 "lr 0.01 and 0.1 of the linear layer (not scaled by the batch)", "best on test itself"):  # fmt: skip
        assert part in printed.replace("\n", " ")


def test_fine_tuning_is_a_function_of_its_settings_and_ten_crops_change_only_the_test(run_dir, patch_shards, tmp_path):
    overrides = ["evaluator=finetune_full", *SMALL_RUN, "evaluator.epochs=1", "evaluator.share=0.4"]
    overrides += [f"checkpoint={run_dir}", f"data.root={patch_shards}", f"eval.out={tmp_path}/result.json"]
    first, again, ten = (run(load([*overrides, *more])) for more in ([], [], ["evaluator.test_views=10"]))
    assert first == again
    assert ten["finetune_full/loss"] == first["finetune_full/loss"]


@pytest.fixture
def no_class_2(photos, tmp_path):
    files = [("jpg", encode(photos[i % 4].resize((40, 40)))) for i in range(12)]
    write_split(tmp_path / "empty", files, [0, 1, 3] * 4)
    write_split(tmp_path / "empty", files, [0, 1, 3] * 4, split="test")
    return tmp_path / "empty"


FAULTS = {
    "no share": (["evaluator.share=0"], r"evaluator\.share is 0\.0, but must be a share above 0"),
    "batch beyond the subset": (
        ["evaluator.batch_size=20"],
        r"batch_size is 20, .* the 8 images .* that train",
    ),
    "no such list": (["evaluator.subset_file=/nowhere.txt"], r"subset_file /nowhere\.txt cannot be read"),
    "empty list": (["evaluator.subset_file={folder}/empty.txt"], r"empty\.txt', but must be a list of file names"),
    "foreign list": (["evaluator.subset_file={folder}/foreign.txt"], r"names 'x\.jpg', but .* has none"),
    "empty class": (["data.root={empty}"], r"1 of the 4 classes of .* have no image, the first is 'class 2'"),
    "window order": (["loader.order=window"], r"loader\.order is 'window', but must be global"),
    "limit": (["data.limit=9"], "data.limit is 9, but finetune_1pct trains on whole epochs"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_sentence_and_exit_code_2(fault, run_dir, patch_shards, no_class_2, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "foreign.txt").write_text("x.jpg\n")
    overrides, message = FAULTS[fault]
    given = dict(item.split("=", 1) for item in ["evaluator=finetune_1pct", *SMALL_RUN, "evaluator.share=0.13"])
    given |= {"checkpoint": str(run_dir), "data.root": str(patch_shards)}
    given |= dict(item.format(folder=tmp_path, empty=no_class_2).split("=", 1) for item in overrides)
    code = main([f"{key}={value}" for key, value in given.items()])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_a_list_that_leaves_a_class_without_an_image_is_refused(named_shards, tmp_path, capsys):
    (tmp_path / "cats.txt").write_text("cat_0.jpg\ncat_1.jpg\n")
    places = [f"data.root={named_shards}", f"data.test_root={named_shards}", "data.test_split=train"]
    code = main(["evaluator=finetune_1pct", f"evaluator.subset_file={tmp_path}/cats.txt", "checkpoint=pixels", *places])
    assert code == 2
    assert "the images listed in cats.txt leaves 1 of 2 classes without an image" in capsys.readouterr().err


@pytest.mark.dist
def test_two_ranks_give_the_result_of_one(run_dir, patch_shards, tmp_path):
    # At ten times these rates a rounding grew to up to 0.7 % of the loss in half of 8 cases (seeds, backends).
    slowly = ["evaluator.lr=0.001", "evaluator.head_lr=0.01"]
    cases = {
        "finetune": ["evaluator=finetune_10pct", *SMALL_RUN, "evaluator.share=0.4", *slowly],
        "batch_norm": ["evaluator=linear_swav", "evaluator.batch_norm=true", "evaluator.epochs=2", "evaluator.lr=0.1",
                       "evaluator.batch_size=20"],
        "knn": ["evaluator=knn", "evaluator.k=[5]"],
    }  # fmt: skip
    common = [f"checkpoint={run_dir}", f"data.root={patch_shards}", "run.batch_size=40"]
    cases = {name: [*overrides, *common] for name, overrides in cases.items()}
    for name, case in cases.items():
        run(load([*case, f"eval.out={tmp_path}/alone-{name}.json"]))
    for name, two in evaluate_on_two_ranks(cases, tmp_path).items():
        one = json.loads((tmp_path / f"alone-{name}.json").read_text())
        # Gradients and statistics add up in another order.
        assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-4)
        assert two["confusion"] == one["confusion"]
        assert two["per_class_top1"] == one["per_class_top1"]
    assert checkpoint.check(run_dir / "checkpoints" / "step-00000007") is None
