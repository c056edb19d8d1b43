"""Loader: what a step holds depends on the data, the views, the batch size and the seed, and on nothing else."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image

from pipelines.augment import AugmentSpec
from pipelines.backends import DecodeError
from pipelines.draw import draw_view
from pipelines.loader import Batch, Loader, available_cores, read_once
from pipelines.order import order, windowed_order
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest, ShardError
from tests.pipelines.torchvision_chain import view_of
from tests.shards import write_split

AUGMENT = AugmentSpec(jitter_p=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale_p=0.2, blur_p=0.5)
SPECS = [ViewSpec("query", 32, augment=AUGMENT), ViewSpec("local", 16, count=2, augment=AUGMENT)]
EVAL = [ViewSpec("eval", 32, crop="center", resize=36, augment=AugmentSpec(flip_p=0.0))]
BATCH = 12  # of 61 samples: 5 steps an epoch, and 1 sample is dropped


@pytest.fixture(scope="module")
def manifest(tiny_shards) -> Manifest:
    return Manifest.load(tiny_shards)


@pytest.fixture
def damaged(tiny_shards, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_shards, tmp_path / "shards"))


def take(manifest: Manifest, num: int, start: int = 0, **options) -> list[Batch]:
    with Loader(manifest, SPECS, **{"batch_size": BATCH, "seed": 7, **options}) as loader:
        batches = loader.batches(start)
        return [next(batches) for _ in range(num)]


def rows_of(batches: list[Batch]) -> dict[int, tuple]:
    """id -> (label, pixels of all views) of all samples of a step, over its ranks."""
    found = {}
    for batch in batches:
        views = [view for role in sorted(batch.views) for view in batch.views[role]]
        for place, sample in enumerate(batch.ids.tolist()):
            assert sample not in found
            found[sample] = (int(batch.labels[place]), *(view[place].numpy().tobytes() for view in views))
    return found


@pytest.fixture(scope="module")
def reference(manifest) -> list[dict[int, tuple]]:
    """Seven steps, over the end of the first epoch, read by one rank."""
    return [rows_of([batch]) for batch in take(manifest, 7, threads=1, prefetch=1)]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_step_is_the_same_for_any_number_of_ranks(world, manifest, reference):
    ranks = [take(manifest, 7, rank=rank, world=world) for rank in range(world)]
    for step, parts in enumerate(zip(*ranks)):
        assert [len(part.ids) for part in parts] == [BATCH // world] * world
        assert rows_of(list(parts)) == reference[step]


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 4), (2, 1), (3, 2), (16, 8)])
def test_a_step_is_the_same_for_any_threads_and_prefetch(threads, prefetch, manifest, reference):
    batches = take(manifest, 7, threads=threads, prefetch=prefetch)
    assert [rows_of([batch]) for batch in batches] == reference
    assert [batch.step for batch in batches] == list(range(7))


@pytest.mark.parametrize("start", [1, 4, 5, 6])
def test_a_step_is_the_same_when_started_at_directly(start, manifest, reference):
    (batch,) = take(manifest, 1, start)
    assert batch.step == start
    assert rows_of([batch]) == reference[start]


@pytest.mark.parametrize("order", ["global", "window"])
@pytest.mark.parametrize("batch_size", [1, 12, 61])
def test_an_epoch_holds_each_sample_once_but_for_the_tail(order, batch_size, manifest):
    with Loader(manifest, EVAL, batch_size=batch_size, seed=1, order=order) as loader:
        assert (loader.steps_per_epoch, loader.dropped_per_epoch) == divmod(61, batch_size)
        batches = loader.batches()
        for _ in range(2):
            ids = [i for _ in range(loader.steps_per_epoch) for i in next(batches).ids.tolist()]
            assert len(ids) == len(set(ids)) == 61 - loader.dropped_per_epoch


def test_the_window_order_is_followed(tiny_files, tmp_path):
    manifest = write_split(tmp_path, tiny_files, shard_size=1)
    with Loader(manifest, EVAL, batch_size=20, seed=3, order="window") as loader:
        batches = loader.batches(1)
        ids = [next(batches).ids.tolist() for _ in range(3)]
    first, second = (windowed_order([1] * 61, 3, epoch).tolist() for epoch in range(2))
    assert ids == [first[20:40], first[40:60], second[:20]]
    assert first != order(61, 3, 0).tolist()


def test_a_batch_is_what_torchvision_makes_of_its_draws(manifest, tiny_files):
    first, second = take(manifest, 2, backend="exact")
    permuted = []
    for batch in (first, second):
        ids = batch.ids.tolist()
        permuted += ids
        index = manifest.index()[ids]
        assert_array_equal(batch.labels, index["label"])
        assert set(batch.views) == {"query", "local"}
        views = [*batch.views["query"], *batch.views["local"]]
        for number, (view, spec) in enumerate(zip(views, [SPECS[0], SPECS[1], SPECS[1]])):
            draws = draw_view(spec, number, 7, 0, ids, index["width"], index["height"])
            for place, sample in enumerate(ids):
                image = Image.open(io.BytesIO(tiny_files[sample][1]))
                assert_array_equal(view[place].permute(1, 2, 0), np.asarray(view_of(image, spec, draws, place)))
    assert permuted != sorted(permuted)


def test_a_batch_has_the_promised_types(manifest):
    (batch,) = take(manifest, 1)
    assert (batch.labels.dtype, batch.ids.dtype) == (torch.int64, torch.int64)
    assert {role: len(views) for role, views in batch.views.items()} == {"query": 1, "local": 2}
    for view in (*batch.views["query"], *batch.views["local"]):
        assert view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)


def test_data_without_labels_has_label_minus_1(tiny_shards_unlabelled):
    (batch,) = take(Manifest.load(tiny_shards_unlabelled), 1)
    assert batch.labels.tolist() == [-1] * BATCH


def test_the_views_of_an_image_differ_from_each_other_and_from_the_next_epochs(manifest):
    first, *_, later = take(manifest, 6, batch_size=61)[:2]
    assert not torch.equal(first.views["local"][0], first.views["local"][1])
    again = {int(i): place for place, i in enumerate(later.ids)}
    places = [again[int(i)] for i in first.ids]
    same = (first.views["query"][0] == later.views["query"][0][places]).flatten(1).all(1)
    assert same.sum() == 0


class TestFingerprint:
    def of(self, manifest, specs=SPECS, **options) -> str:
        with Loader(manifest, specs, **{"batch_size": BATCH, "seed": 7, **options}) as loader:
            return loader.fingerprint

    @pytest.mark.parametrize(
        "options",
        [{"rank": 1, "world": 2}, {"threads": 3}, {"prefetch": 5}, {"backend": "exact"}, {"output": "float32"}],
        ids=str,
    )
    def test_is_the_same_for_settings_that_do_not_change_a_step(self, manifest, options):
        assert self.of(manifest, **options) == self.of(manifest)

    @pytest.mark.parametrize("options", [{"batch_size": 6}, {"seed": 8}, {"order": "window"}], ids=str)
    def test_differs_for_settings_that_change_a_step(self, manifest, options):
        assert self.of(manifest, **options) != self.of(manifest)

    @pytest.mark.parametrize("change", [{"size": 33}, {"count": 2}, {"scale": (0.3, 1.0)}, {"role": "key"}], ids=str)
    def test_differs_for_other_views(self, manifest, change):
        assert self.of(manifest, [dataclasses.replace(SPECS[0], **change), SPECS[1]]) != self.of(manifest)

    def test_differs_for_another_augmentation(self, manifest):
        other = dataclasses.replace(SPECS[0], augment=dataclasses.replace(AUGMENT, blur_sigma=(0.1, 1.9)))
        assert self.of(manifest, [other, SPECS[1]]) != self.of(manifest)

    def test_differs_for_other_data(self, manifest, tiny_files, tmp_path):
        swapped = write_split(tmp_path, [tiny_files[1], tiny_files[0], *tiny_files[2:]], [0] * 61)
        assert self.of(swapped) != self.of(manifest)


class TestBadInput:
    def test_a_batch_larger_than_the_data(self, manifest):
        with pytest.raises(ValueError, match=r"run\.batch_size is 62, but train in .* only 61 samples; use at most 61"):
            take(manifest, 0, batch_size=62)

    def test_a_world_that_does_not_divide_the_batch(self, manifest):
        with pytest.raises(ValueError, match=r"run\.batch_size is 12, which 5 ranks cannot share .* multiple of 5"):
            take(manifest, 0, world=5)

    @pytest.mark.parametrize(
        ("options", "key"),
        [
            ({"batch_size": 0}, r"run\.batch_size"),
            ({"seed": -1}, r"run\.seed"),
            ({"order": "shuffled"}, r"loader\.order"),
            ({"threads": -1}, r"loader\.threads"),
            ({"prefetch": 0}, r"loader\.prefetch"),
            ({"backend": "turbo"}, r"loader\.backend"),
            ({"output": "int8"}, r"loader\.output"),
        ],
    )
    def test_a_setting_out_of_range_is_named(self, manifest, options, key):
        with pytest.raises(ValueError, match=rf"{key} is .*, but must be"):
            take(manifest, 0, **options)

    @pytest.mark.parametrize("specs", [[]])
    def test_no_view(self, manifest, specs):
        with pytest.raises(ValueError, match="there are no views"):
            Loader(manifest, specs, batch_size=1, seed=0)

    def test_all_faults_of_the_shards_are_listed_at_once(self, damaged):
        manifest = Manifest.load(damaged)
        manifest.shard_path(0).unlink()
        os.truncate(manifest.shard_path(2), 1000)
        for use in (lambda: take(manifest, 1), lambda: read_once(manifest, EVAL, batch_size=4)):
            with pytest.raises(ShardError, match=r"train-000000\.tar is missing; .*train-000002\.tar has 1000 bytes"):
                use()

    def test_rows_that_are_not_there(self, manifest):
        with pytest.raises(ValueError, match="sample ids go from 3 to 61, but train holds 0 to 60"):
            read_once(manifest, EVAL, batch_size=4, rows=[3, 61])


class TestErrorsAndEnds:
    @pytest.fixture(autouse=True)
    def _note_threads(self):
        self.before = set(threading.enumerate())

    def new_threads(self) -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread not in self.before]

    def test_a_bad_image_is_raised_in_the_consumer_with_its_name(self, tiny_files, tmp_path):
        files = list(tiny_files)
        files[30] = ("jpg", files[30][1][:300])
        manifest = write_split(tmp_path, files)
        loader = Loader(manifest, EVAL, batch_size=61, seed=0)
        with pytest.raises(DecodeError, match=r"train-000001\.tar:000000030\.jpg cannot be decoded"):
            next(loader.batches())
        loader.close()
        assert not self.new_threads()

    def test_batches_before_a_bad_image_still_arrive(self, tiny_files, tmp_path):
        files = list(tiny_files)
        files[30] = ("jpg", b"not an image")
        manifest = write_split(tmp_path, files)
        batches = read_once(manifest, EVAL, batch_size=4)
        assert [next(batches).ids[0] for _ in range(7)] == [0, 4, 8, 12, 16, 20, 24]
        with pytest.raises(DecodeError, match=r"000000030"):
            next(batches)
        assert not self.new_threads()

    def test_damage_during_the_run_is_raised_in_the_consumer(self, damaged):
        manifest = Manifest.load(damaged)
        with Loader(manifest, EVAL, batch_size=2, seed=0, prefetch=1) as loader:
            batches = loader.batches()
            next(batches)
            for shard in range(4):
                os.truncate(manifest.shard_path(shard), 512)
            with pytest.raises(ShardError, match=r"train-00000\d\.tar:.* ends after 0 of \d+ bytes"):
                list(itertools.islice(batches, 30))
            with pytest.raises(StopIteration):
                next(batches)

    def test_close_ends_all_threads_though_the_consumer_stopped_early(self, manifest):
        loader = Loader(manifest, SPECS, batch_size=BATCH, seed=0, prefetch=3)
        next(loader.batches())
        assert self.new_threads()
        loader.close()
        loader.close()
        assert not self.new_threads()

    def test_close_before_the_first_batch(self, manifest):
        loader = Loader(manifest, SPECS, batch_size=BATCH, seed=0)
        loader.close()
        assert not self.new_threads()

    def test_a_loop_left_early_ends_the_threads_of_read_once(self, manifest):
        for _ in read_once(manifest, EVAL, batch_size=4):
            break
        assert not self.new_threads()

    def test_a_second_iterator_starts_where_it_is_told_and_ends_the_first(self, manifest, reference):
        with Loader(manifest, SPECS, batch_size=BATCH, seed=7, prefetch=4) as loader:
            first = loader.batches()
            next(first)
            second = loader.batches(3)
            assert rows_of([next(second)]) == reference[3]
            with pytest.raises(StopIteration):
                next(first)

    def test_the_order_of_the_next_epoch_is_made_in_the_background_from_the_middle_of_this_one(
        self, manifest, monkeypatch
    ):
        made = []

        def recorded(num_samples, seed, epoch):
            made.append((epoch, threading.current_thread().name.rpartition("_")[0]))
            return order(num_samples, seed, epoch)

        monkeypatch.setattr("pipelines.loader.order", recorded)
        with Loader(manifest, EVAL, batch_size=1, seed=5, prefetch=1) as loader:
            batches = loader.batches()
            ids = [int(next(batches).ids[0]) for _ in range(20)]
            assert [epoch for epoch, _ in made] == [0]  # 61 steps an epoch: of a run of 20 no second order is wanted
            ids += [int(next(batches).ids[0]) for _ in range(61)]
            assert ids == [*order(61, 5, 0), *order(61, 5, 1)][:81]
            assert made[1:] == [(1, "fastssl-order")]
        assert not self.new_threads()

    def test_an_order_that_cannot_be_made_is_raised_in_the_consumer(self, manifest, monkeypatch):
        def failing(num_samples, seed, epoch):
            if epoch == 1:
                raise MemoryError("no room for an order")
            return order(num_samples, seed, epoch)

        monkeypatch.setattr("pipelines.loader.order", failing)
        with (
            Loader(manifest, EVAL, batch_size=30, seed=0) as loader,
            pytest.raises(MemoryError, match="no room for an order"),
        ):
            list(itertools.islice(loader.batches(), 3))
        assert not self.new_threads()

    def test_memory_is_bounded_by_prefetch_when_the_consumer_is_slow(self, manifest, monkeypatch):
        made = []
        original = draw_view
        monkeypatch.setattr("pipelines.renderer.draw_view", lambda *a: made.append(1) or original(*a))
        with Loader(manifest, EVAL, batch_size=4, seed=0, prefetch=3) as loader:
            next(loader.batches())
            time.sleep(0.3)
            assert len(made) <= 1 + 3 + 1  # taken, in the backend, being made

    def test_a_script_that_does_not_close_its_loader_still_ends(self, tiny_shards):
        script = f"""
from pipelines.loader import Loader
from pipelines.order import order, windowed_order
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest
loader = Loader(Manifest.load({str(tiny_shards)!r}), [ViewSpec("query", 32)], batch_size=8, seed=0)
print(next(loader.batches()).step)
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")

    def test_a_script_ends_well_while_its_loader_is_inside_torch(self):
        script = """
import torch
from pipelines.loader import _Stream
def source():
    yield 0
    yield 1
    ones = torch.ones(1500, 1500, dtype=torch.float64)
    for _ in range(8):
        (ones @ ones).sum()
    yield 2
stream = _Stream(source())
print(next(stream), next(stream))
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0 1\n", "")


class TestReadOnce:
    @pytest.mark.parametrize(("batch_size", "world"), [(8, 1), (8, 2), (7, 3), (100, 4), (1, 2)])
    def test_ranks_read_each_sample_once_in_row_order(self, batch_size, world, manifest):
        read = []
        for rank in range(world):
            batches = list(read_once(manifest, EVAL, batch_size=batch_size, rank=rank, world=world))
            share = max(1, batch_size // world)
            assert [len(batch.ids) for batch in batches[:-1]] == [share] * (len(batches) - 1)
            assert 0 < len(batches[-1].ids) <= share
            assert [batch.step for batch in batches] == list(range(len(batches)))
            read += [i for batch in batches for i in batch.ids.tolist()]
        assert read == list(range(61))

    def test_more_ranks_than_samples_leave_some_without(self, manifest):
        read = [
            [i for batch in read_once(manifest, EVAL, batch_size=4, rank=rank, world=4, limit=3) for i in batch.ids]
            for rank in range(4)
        ]
        assert sorted(len(part) for part in read) == [0, 1, 1, 1]

    def test_rows_and_limit_choose_samples(self, manifest):
        batches = read_once(manifest, EVAL, batch_size=2, rows=[50, 3, 3, 20], limit=3)
        assert [batch.ids.tolist() for batch in batches] == [[50, 3], [3]]

    def test_a_center_view_is_the_same_in_any_batch(self, manifest):
        whole = torch.cat([batch.views["eval"][0] for batch in read_once(manifest, EVAL, batch_size=61)])
        (one,) = read_once(manifest, EVAL, batch_size=1, rows=[42])
        assert torch.equal(one.views["eval"][0][0], whole[42])

    def test_a_view_of_a_training_step_can_be_shown_again(self, manifest, reference):
        """Step 6 is the second of epoch 1."""
        ids = sorted(reference[6])
        batches = list(read_once(manifest, SPECS, batch_size=5, rows=ids, seed=7, epoch=1))
        assert rows_of(batches) == reference[6]

    def test_float_output_is_normalised(self, manifest):
        (batch,) = read_once(manifest, EVAL, batch_size=61, output="float32", limit=4)
        assert batch.views["eval"][0].dtype == torch.float32
        assert batch.views["eval"][0].min() < 0


def test_the_cores_of_a_host_are_shared_by_its_ranks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for ranks, cores in (("1", 12), ("5", 2), ("64", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert available_cores() == cores
