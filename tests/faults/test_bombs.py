"""Decompression bombs in shards cost training no more than reading their headers, whatever the backend."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from pipelines.augment import AugmentSpec
from pipelines.backends import DecodeError
from pipelines.loader import Loader, read_once
from pipelines.views import ViewSpec
from shard_tools import stamps
from shard_tools.manifest import Damaged, Manifest
from tests.faults.memory import resident_mb
from tests.pipelines import bombs
from tests.shards import write_split

SPECS = [ViewSpec("query", 32, count=2, augment=AugmentSpec(jitter_p=0.8, brightness=0.4))]
STAMP_SPECS = [ViewSpec("query", 8, crop="turned", turn_deg=180.0, augment=AugmentSpec(mean=(0.0,), std=(1.0,)))]
FIRST = 7  # id of the first bomb; the others follow
NUM_SAMPLES = 48


@pytest.fixture(scope="module")
def files(tiny_files) -> list[tuple[str, bytes]]:
    return [file for file in tiny_files if file[0] == "jpg"][:NUM_SAMPLES]


@pytest.fixture(scope="module")
def clean(files, tmp_path_factory) -> Manifest:
    return write_split(tmp_path_factory.mktemp("clean"), files)


@pytest.fixture(scope="module")
def mined(files, tmp_path_factory) -> Manifest:
    """The same, with bombs in the places of some, of which the index says that they are small."""
    files = list(files)
    for row, make in enumerate(bombs.BOMBS.values(), FIRST):
        files[row] = ("jpg", make())
    sizes = dict.fromkeys(range(FIRST, FIRST + len(bombs.BOMBS)), (bombs.SIDE, bombs.SIDE))
    return write_split(tmp_path_factory.mktemp("mined"), files, sizes=sizes)


@pytest.mark.fault(
    "decompression bombs in a shard (JPEG, PNG, WebP, BMP; huge sides, scans, texts)",
    "each is named and replaced, within 100 ms and 64 MB, in every backend",
)
@pytest.mark.parametrize("backend", ["native", "exact", "dali"])
def test_bombs_are_refused_by_their_headers(clean, mined, backend, record_property) -> None:
    if backend == "dali":
        pytest.importorskip("nvidia.dali")
    epoch(clean, backend)  # what is loaded and allocated once
    before_s, before_mb, _ = epoch(clean, backend)
    with_bombs_s, with_bombs_mb, replaced = epoch(mined, backend)
    for row, kind in enumerate(bombs.BOMBS, FIRST):
        if backend == "dali" and kind == "PNG with a text of 128 MiB":
            continue  # DALI passes over the text, and decodes the pixels, which are honest
        assert any(f"train-000000.tar:{row:09d}.jpg cannot be decoded" in sentence for sentence in replaced), kind
    a_bomb_s, grown_mb = (with_bombs_s - before_s) / len(bombs.BOMBS), with_bombs_mb - before_mb
    record_property("seen", f"{backend}: {1000 * a_bomb_s:.1f} ms of CPU a bomb, {grown_mb:.0f} MB for all of them")
    assert a_bomb_s < 0.1
    assert grown_mb < 64


def epoch(manifest: Manifest, backend: str) -> tuple[float, float, set[str]]:
    """CPU seconds and the most resident memory in MB of an epoch, and what was replaced in it."""
    options = {"batch_size": 8, "seed": 1, "threads": 1, "prefetch": 1, "on_bad": "replace", "backend": backend}
    with Loader(manifest, SPECS, **options) as loader:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        start_mb, start_s = resident_mb("VmRSS"), time.process_time()
        batches = list(itertools.islice(loader.batches(), loader.steps_per_epoch))
        return (
            time.process_time() - start_s,
            resident_mb("VmHWM") - start_mb,
            {sentence for batch in batches for sentence in batch.replaced},
        )


@pytest.mark.fault(
    "a decompression bomb in a split that is evaluated", "it ends at once, and says which file", exit_code=2
)
def test_an_evaluation_ends_at_a_bomb_with_its_name(files, tmp_path, record_property) -> None:
    files = [*files[:3], ("jpg", bombs.jpeg(20_000, 20_000))]
    manifest = write_split(tmp_path, files, sizes={3: (64, 64)})
    with pytest.raises(
        DecodeError, match=r"^train-000000\.tar:000000003\.jpg cannot be decoded \(its header claims 20000"
    ):
        list(read_once(manifest, SPECS, batch_size=2))
    record_property("seen", "train-000000.tar:000000003.jpg")


@pytest.mark.fault(
    "an index that admits a bomb's size", "training and verify refuse the split at the start", exit_code=7
)
def test_an_index_that_admits_the_size_is_refused_at_the_start(files, tmp_path) -> None:
    manifest = write_split(tmp_path, [*files[:3], ("jpg", bombs.jpeg(20_000, 20_000))], sizes={3: (20_000, 20_000)})
    with pytest.raises(Damaged, match="sample 3 has impossible dimensions"):
        Loader(manifest, SPECS, batch_size=2, seed=0)


@pytest.mark.fault("a stamp that claims 256 GB", "it is named and replaced, within 100 ms and 64 MB")
def test_a_stamp_that_claims_more_than_it_holds(tmp_path, rng, record_property) -> None:
    good = [stamps.encode(rng.random((1, 12, 12))) for _ in range(16)]
    bomb = good[5].replace(b"'shape': (1, 12, 12), }          ", b"'shape': (64, 32000, 32000), }   ")
    assert len(bomb) == len(good[5]) != good[5]
    good[5] = bomb
    manifest = stamps_split(tmp_path, good)
    with Loader(manifest, STAMP_SPECS, batch_size=8, seed=1, on_bad="replace", output="float32") as loader:
        Path("/proc/self/clear_refs").write_text("5")
        start_mb, start_s = resident_mb("VmRSS"), time.process_time()
        replaced = {text for batch in itertools.islice(loader.batches(), 2) for text in batch.replaced}
    seconds, grown_mb = time.process_time() - start_s, resident_mb("VmHWM") - start_mb
    assert any("train-000000.tar:000000005.npy is no good stamp" in text for text in replaced)
    record_property("seen", f"{1000 * seconds:.0f} ms, {grown_mb:.0f} MB for two batches")
    assert seconds < 0.1
    assert grown_mb < 64


def stamps_split(root: Path, files: list[bytes]) -> Manifest:
    from dataclasses import replace

    from shard_tools.manifest import MANIFEST_NAME

    made = write_split(root, [("npy", file) for file in files], sizes=dict.fromkeys(range(len(files)), (12, 12)))
    signed = replace(made, census={"bands": 1})
    (made.root / MANIFEST_NAME).write_bytes(signed.to_bytes())
    return Manifest.load(root)
