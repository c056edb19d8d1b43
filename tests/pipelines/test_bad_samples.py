"""Samples that cannot be read or decoded while training: replaced, named, and their neighbours left alone."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch

from pipelines.augment import AugmentSpec
from pipelines.backends import DecodeError
from pipelines.bad_samples import ATTEMPTS, replacement
from pipelines.loader import Batch, Loader
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest, ShardError
from tests.shards import write_split

SPECS = [ViewSpec("query", 32, count=2, augment=AugmentSpec(jitter_p=0.8, brightness=0.4, blur_p=0.5))]
BATCH = 8
BAD = {  # sample -> what its member holds
    5: lambda payload: payload[: len(payload) // 2],  # cut in the middle
    17: lambda payload: b"not an image",
    30: lambda payload: b"\xff\xd8\xff\xe0" + bytes(200),  # the beginning of a JPEG
}
STRUCK = 44  # a sample whose bytes change after packing: its crc32 no longer holds


@pytest.fixture(scope="module")
def clean(tiny_files, tmp_path_factory) -> Manifest:
    return write_split(tmp_path_factory.mktemp("clean"), tiny_files)


@pytest.fixture(scope="module")
def spoilt(tiny_files, tmp_path_factory) -> Manifest:
    """The same samples, of which four are bad in different ways; three behind pack's back, one behind the index's."""
    files = [(suffix, BAD[i](payload) if i in BAD else payload) for i, (suffix, payload) in enumerate(tiny_files)]
    manifest = write_split(tmp_path_factory.mktemp("spoilt"), files)
    entry = manifest.index()[STRUCK]
    with open(manifest.shard_path(int(entry["shard"])), "r+b") as file:
        file.seek(int(entry["offset"]) + 60)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    return Manifest.load(manifest.root)


ALL_BAD = {*BAD, STRUCK}


def take(manifest: Manifest, num: int, start: int = 0, **options) -> list[Batch]:
    with Loader(manifest, SPECS, **{"batch_size": BATCH, "seed": 3, "on_bad": "replace", **options}) as loader:
        return list(itertools.islice(loader.batches(start), num))


@pytest.mark.parametrize("backend", ["exact", "dali"])
def test_every_batch_is_whole_and_neighbours_keep_their_views(clean, spoilt, backend):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    num = 2 * (61 // BATCH)
    replaced = 0
    for good, mended in zip(take(clean, num, backend=backend), take(spoilt, num, backend=backend), strict=True):
        assert mended.ids.shape == good.ids.shape
        assert not set(mended.ids.tolist()) & ALL_BAD
        same = mended.ids == good.ids
        assert set(good.ids[~same].tolist()) == set(good.ids.tolist()) & ALL_BAD
        assert torch.equal(mended.labels[same], good.labels[same])
        for role in good.views:
            for a, b in zip(good.views[role], mended.views[role], strict=True):
                assert a.shape == b.shape
                assert torch.equal(a[same], b[same])
        replaced += int((~same).sum())
        assert len(mended.replaced) >= int((~same).sum())
        assert good.replaced == ()
    assert replaced >= 4


def test_each_bad_sample_is_named_with_shard_and_member(spoilt):
    found = {sentence for batch in take(spoilt, 4 * (61 // BATCH)) for sentence in batch.replaced}
    assert len(found) == len(ALL_BAD)  # one sentence a sample, the same whenever it comes
    for sample in ALL_BAD:
        (sentence,) = [s for s in found if f":{sample:09d}." in s]
        assert sentence.startswith("train-00000")
        assert ("crc32" in sentence) == (sample == STRUCK)


def test_a_replacement_shows_the_views_that_it_has_in_its_own_place(clean, spoilt):
    """Its random numbers are those of its own id, so nothing new is drawn."""
    num = 61 // BATCH
    views = {}
    for batch in take(clean, num):
        for i, sample in enumerate(batch.ids.tolist()):
            views[sample] = [view[i] for view in batch.views["query"]]
    checked = 0
    for good, mended in zip(take(clean, num), take(spoilt, num)):
        for i in (mended.ids != good.ids).nonzero()[:, 0].tolist():
            if (sample := int(mended.ids[i])) in views:
                checked += 1
                assert all(torch.equal(v[i], w) for v, w in zip(mended.views["query"], views[sample]))
    assert checked


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 3, "prefetch": 1}, {"prefetch": 4}])
def test_threads_prefetch_and_resume_change_nothing(spoilt, options):
    whole = take(spoilt, 14)
    for a, b in zip(whole[5:], take(spoilt, 9, start=5, **options), strict=True):
        assert (a.step, a.ids.tolist(), sorted(a.replaced)) == (b.step, b.ids.tolist(), sorted(b.replaced))
        assert all(torch.equal(v, w) for v, w in zip(a.views["query"], b.views["query"], strict=True))


def test_two_ranks_see_what_one_sees(spoilt):
    alone = take(spoilt, 7)
    ranks = [take(spoilt, 7, rank=r, world=2) for r in (0, 1)]
    for step, batch in enumerate(alone):
        assert batch.ids.tolist() == [i for rank in ranks for i in rank[step].ids.tolist()]


def test_a_bad_replacement_is_replaced_in_its_turn(tiny_files, tmp_path):
    """Every odd sample is bad: half of the first choices are bad too."""
    files = [("jpg", b"bad") if i % 2 else file for i, file in enumerate(tiny_files)]
    manifest = write_split(tmp_path, files)
    batches = take(manifest, 7)
    assert all(sample % 2 == 0 for batch in batches for sample in batch.ids.tolist())
    assert sum(len(batch.replaced) for batch in batches) > 28


def test_data_that_is_all_bad_ends_with_a_sentence(tiny_files, tmp_path):
    manifest = write_split(tmp_path, [("jpg", b"bad")] * len(tiny_files))
    with pytest.raises(
        ShardError, match=rf"{ATTEMPTS} samples that should have replaced a bad one are bad too, the last"
    ):
        take(manifest, 1)


def test_without_leave_to_replace_the_first_bad_sample_ends_it(spoilt):
    with pytest.raises((DecodeError, ShardError), match=r"train-00000"):
        take(spoilt, 7, on_bad="fail")
    with pytest.raises(ValueError, match=r"loader\.on_bad is 'skip', but must be fail or replace"):
        take(spoilt, 1, on_bad="skip")


def test_replacements_are_spread_over_the_data_and_differ_by_epoch_and_attempt():
    chosen = np.array([replacement(1, 0, sample, 0, 1000) for sample in range(4000)])
    counts = np.bincount(chosen // 100, minlength=10)
    assert counts.min() > 320
    assert counts.max() < 480
    assert replacement(1, 0, 7, 0, 1000) == replacement(1, 0, 7, 0, 1000)
    assert len({replacement(1, e, 7, a, 10**6) for e in range(5) for a in range(5)}) == 25
