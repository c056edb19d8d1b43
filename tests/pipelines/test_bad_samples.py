"""Samples that cannot be read or decoded while training: replaced, named, and their neighbours left alone."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment import AugmentSpec
from pipelines.backends import DecodeError
from pipelines.bad_samples import ATTEMPTS, replacement
from pipelines.loader import Batch, Loader, read_once
from pipelines.views import ViewSpec
from shard_tools.extract import extract
from shard_tools.manifest import Damaged, Manifest, ShardError
from tests.pipelines import bombs
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


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def photo_of(payload: bytes) -> Image.Image:
    return Image.open(io.BytesIO(payload)).convert("RGB")


UNUSABLE: dict[str, Callable[[bytes], bytes]] = {
    "cut at 10 %": lambda payload: payload[: len(payload) // 10],
    "cut at 50 %": lambda payload: payload[: len(payload) // 2],
    "cut at 90 %": lambda payload: payload[: len(payload) * 9 // 10],
    "without its last 2 bytes": lambda payload: payload[:-2],
    "one byte": lambda payload: b"x",
    "text": lambda payload: b"not an image",
    "an error page": lambda payload: b"<html><body>404 Not Found</body></html>",
    "random bytes": lambda payload: np.random.default_rng(3).bytes(900),
    "zeros": lambda payload: bytes(900),
    "the beginning of a JPEG, then zeros": lambda payload: payload[:4] + bytes(len(payload) - 4),
    "a header of zeros": lambda payload: bytes(20) + payload[20:],
    "no tables": lambda payload: payload.replace(b"\xff\xdb", b"\xff\xe9"),
    "GIF": lambda payload: saved(photo_of(payload), "GIF"),
    "TIFF": lambda payload: saved(photo_of(payload), "TIFF"),
    "PostScript": lambda payload: saved(photo_of(payload), "EPS"),
    "a cut PNG": lambda payload: saved(photo_of(payload), "PNG")[:-300],
    "a cut WebP": lambda payload: saved(photo_of(payload), "WEBP")[:-100],
    "a bomb": lambda payload: bombs.jpeg(20_000, 20_000),
}
USABLE: dict[str, Callable[[bytes], bytes]] = {
    "trailing bytes": lambda payload: payload + b"trailing",
    "16-bit PNG": lambda payload: saved(
        Image.fromarray(np.asarray(photo_of(payload).convert("L")) * np.uint16(257)), "PNG"
    ),
    "CMYK": lambda payload: saved(photo_of(payload).convert("CMYK"), "JPEG"),
    "progressive": lambda payload: saved(photo_of(payload), "JPEG", progressive=True),
    "palette": lambda payload: saved(photo_of(payload).convert("P"), "PNG"),
    "RGBA": lambda payload: saved(photo_of(payload).convert("RGBA"), "PNG"),
    "WebP": lambda payload: saved(photo_of(payload), "WEBP"),
    "BMP": lambda payload: saved(photo_of(payload), "BMP"),
    "1 x 1": lambda payload: saved(photo_of(payload).resize((1, 1)), "JPEG"),
    "1 x 90": lambda payload: saved(photo_of(payload).resize((1, 90)), "JPEG"),
}
FIRST_KIND = 3  # id of the first of these; every second sample behind it is one more, the others are whole


@pytest.fixture(scope="module")
def all_kinds(tiny_files, tmp_path_factory) -> tuple[Manifest, dict[int, str]]:
    """A split with a sample of every kind, and which sample is of which; one has rotten since it was packed."""
    jpegs = [file for file in tiny_files if file[0] == "jpg"]
    files = (jpegs * 2)[: FIRST_KIND + 2 * (len(UNUSABLE) + len(USABLE)) + 6]
    kinds = {FIRST_KIND + 2 * i: kind for i, kind in enumerate([*UNUSABLE, *USABLE])}
    for row, kind in kinds.items():
        files[row] = ("jpg", (UNUSABLE | USABLE)[kind](files[row][1]))
    sizes = {row: (64, 64) for row, kind in kinds.items() if kind == "a bomb"}
    manifest = write_split(tmp_path_factory.mktemp("kinds"), files, sizes=sizes)
    last = len(files) - 1
    entry = manifest.index()[last]
    with open(manifest.shard_path(int(entry["shard"])), "r+b") as file:
        file.seek(int(entry["offset"]) + int(entry["size"]) // 2)
        file.write(bytes(3))
    return manifest, {**kinds, last: "bit rot"}


@pytest.mark.fault(
    "samples that are cut, empty of sense, no images, of foreign formats, rotten or bombs",
    "each is named and replaced, in every backend; what only looks odd is kept; two ranks make the batches of one",
)
@pytest.mark.parametrize("backend", ["native", "exact", "dali"])
def test_every_kind_of_bad_sample_is_replaced_and_no_odd_one(all_kinds, backend, record_property):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    manifest, kinds = all_kinds
    batches = take(manifest, manifest.num_samples // BATCH * 2, backend=backend)
    assert all(view.shape == (BATCH, 3, 32, 32) for batch in batches for view in batch.views["query"])
    seen = {sample for batch in batches for sample in batch.ids.tolist()}
    replaced = "\n".join(sentence for batch in batches for sentence in batch.replaced)
    found = {kind for row, kind in kinds.items() if f":{row:09d}.jpg " in replaced}
    assert found == {*UNUSABLE, "bit rot"}
    assert not {kinds[sample] for sample in seen if sample in kinds} & found
    ranks = [take(manifest, 4, rank=rank, world=2, backend=backend) for rank in (0, 1)]
    for alone, *parts in zip(batches, *ranks):
        assert alone.ids.tolist() == [sample for part in parts for sample in part.ids.tolist()]
    record_property("seen", f"{backend}: {len(found)} kinds replaced, {len(USABLE)} odd ones kept")


@pytest.mark.fault("a bad sample in a split that is evaluated", "it ends with shard and member; nothing is left out")
@pytest.mark.parametrize("backend", ["native", "exact"])
def test_an_evaluation_ends_at_every_kind_with_its_name(all_kinds, backend, tmp_path):
    manifest, kinds = all_kinds
    for row, kind in kinds.items():
        reading = read_once(manifest, SPECS, batch_size=2, rows=[row - 1, row], backend=backend)
        if kind in USABLE:
            assert [batch.ids.tolist() for batch in reading] == [[row - 1, row]], kind
        else:
            with pytest.raises((DecodeError, ShardError), match=rf"^train-0000\d\d\.tar:{row:09d}\.jpg "):
                list(reading)
    rotten = max(kinds)
    with pytest.raises(Damaged, match=rf":{rotten:09d}\.jpg is damaged"):
        extract(manifest, [rotten], tmp_path)


@pytest.mark.fault("a sample of no bytes", "training refuses the split at its start, and names the sample", exit_code=7)
def test_a_sample_of_no_bytes_is_refused_at_the_start(tiny_files, tmp_path):
    manifest = write_split(tmp_path, [*tiny_files[:9], ("jpg", b"")])
    with pytest.raises(Damaged, match="sample 9 has an impossible size"):
        take(manifest, 1)


@pytest.mark.fault(
    "three shards missing and one cut", "training does not start, and names all four at once", exit_code=7
)
def test_all_faults_of_a_split_are_told_at_the_start(tiny_files, tmp_path, record_property):
    manifest = write_split(tmp_path, tiny_files, shard_size=10)
    for shard in (0, 2, 5):
        manifest.shard_path(shard).unlink()
    os.truncate(manifest.shard_path(3), 5000)
    (tmp_path / "train/train-000004.idx").write_text("of another tar")  # DALI's, which nothing here reads
    with pytest.raises(Damaged) as raised:
        take(manifest, 1)
    said = str(raised.value)
    assert said.count(" is missing") == 3
    assert all(f"train-00000{shard}.tar is missing" in said for shard in (0, 2, 5))
    assert "train-000003.tar has 5000 bytes, but its manifest says" in said
    assert "train-000004" not in said
    record_property("seen", "4 of 4 named")


@pytest.mark.fault(
    "a shard cut while it is read, its last member cut, index.npy cut to nothing",
    "the process lives: samples that are gone are named and replaced, the index was in memory",
)
@pytest.mark.parametrize("backend", ["native", "exact", "dali"])
def test_files_that_are_cut_during_a_run_end_no_process(tiny_files, tmp_path, backend, record_property):
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    manifest = write_split(tmp_path, tiny_files, shard_size=6)
    last = manifest.index()[5]
    options = {"batch_size": BATCH, "seed": 3, "on_bad": "replace", "backend": backend, "prefetch": 1}
    with Loader(manifest, SPECS, **options) as loader:
        batches = loader.batches()
        assert next(batches).replaced == ()
        os.truncate(manifest.shard_path(0), int(last["offset"]) + int(last["size"]) // 2)
        os.truncate(manifest.shard_path(1), 0)
        os.truncate(tmp_path / "train/index.npy", 0)
        rest = list(itertools.islice(batches, 3 * loader.steps_per_epoch))
    assert all(view.shape == (BATCH, 3, 32, 32) for batch in rest for view in batch.views["query"])
    said = "\n".join(sentence for batch in rest for sentence in batch.replaced)
    named = {row for row in range(len(tiny_files)) if f":{row:09d}" in said}
    assert named == set(range(5, 12))
    record_property("seen", f"{backend}: {len(named)} lost samples named, {len(rest)} whole batches after the cut")
