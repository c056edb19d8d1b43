"""DALI behind the loader: the same batches as with the exact backend, to its tolerance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipelines.backends import DecodeError
from pipelines.loader import Batch, Loader, read_once
from shard_tools.manifest import Manifest
from tests.pipelines.test_dali import CENTER, SMALL
from tests.shards import write_split


def assert_same(ours: Batch, theirs: Batch) -> None:
    assert ours.step == theirs.step
    assert torch.equal(ours.ids, theirs.ids)
    assert torch.equal(ours.labels, theirs.labels)
    assert ours.views.keys() == theirs.views.keys()
    for role, views in ours.views.items():
        for view, exact in zip(views, theirs.views[role], strict=True):
            # The tolerance of a view is 0.5, of thousands of images; here it is six. Wrong draws are ten or more apart.
            assert (view.float() - exact.float()).abs().mean() < 1.0


@pytest.mark.parametrize("start_step", [0, 5])
def test_the_batches_of_a_step_are_those_of_the_exact_backend(tiny_shards: Path, start_step: int) -> None:
    manifest = Manifest.load(tiny_shards)
    options = {"batch_size": 12, "seed": 4, "rank": 1, "world": 2, "threads": 2}
    with (
        Loader(manifest, SMALL, backend="dali", **options) as ours,
        Loader(manifest, SMALL, backend="exact", **options) as theirs,
    ):
        assert ours.fingerprint == theirs.fingerprint
        pairs = zip(ours.batches(start_step), theirs.batches(start_step), strict=False)
        for _ in range(6):  # five steps are an epoch
            assert_same(*next(pairs))


def test_each_sample_is_read_once_with_a_smaller_last_batch(tiny_shards: Path) -> None:
    manifest = Manifest.load(tiny_shards)
    sizes = []
    readers = (read_once(manifest, CENTER, batch_size=16, backend=name, threads=2) for name in ("dali", "exact"))
    for ours, theirs in zip(*readers, strict=True):
        assert_same(ours, theirs)
        sizes.append(len(ours.ids))
    assert sizes == [16, 16, 16, 13]


def test_a_bad_sample_is_named_by_shard_and_member(tiny_files: list[tuple[str, bytes]], tmp_path: Path) -> None:
    files = list(tiny_files[:24])
    files[21] = ("jpg", tiny_files[0][1][:300])
    manifest = write_split(tmp_path, files)
    with pytest.raises(DecodeError, match=r"train-000001\.tar:000000021\.jpg cannot be decoded"):
        list(read_once(manifest, CENTER, batch_size=8, backend="dali", threads=2))
