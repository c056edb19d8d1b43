"""What pack writes is read unchanged by the webdataset package, DALI's own reader, timm and Hugging Face datasets."""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm.data
import webdataset
from PIL import Image

from shard_tools.manifest import Manifest
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import imagefolder
from tests.shard_tools.builders import class_tree, payloads


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """21 labelled JPEGs in 3 shards."""
    root = tmp_path_factory.mktemp("interop")
    src = class_tree(root / "src")
    return pack(imagefolder.open_source(src, "train"), root / "dst", PackOptions(shard_size=8)).manifest


def expected(manifest: Manifest) -> list[tuple[bytes, int]]:
    return list(zip(payloads(manifest), manifest.index()["label"].tolist()))


def shard_paths(manifest: Manifest) -> list[str]:
    return [str(manifest.shard_path(i)) for i in range(len(manifest.shards))]


# webdataset leaves its files to the garbage collector
leaves_files_open = pytest.mark.filterwarnings("ignore::ResourceWarning")


@leaves_files_open
def test_the_webdataset_package_reads_keys_bytes_labels_and_metadata(packed: Manifest) -> None:
    samples = list(webdataset.WebDataset(shard_paths(packed), shardshuffle=False))
    assert [(s["jpg"], int(s["cls"])) for s in samples] == expected(packed)
    assert [s["__key__"] for s in samples] == [f"{row:09d}" for row in range(21)]
    assert packed.classes is not None
    for row, sample in enumerate(samples):
        meta = json.loads(sample["json"])
        assert meta["class"] == packed.classes[int(sample["cls"])]
        assert (meta["width"], meta["height"]) == tuple(packed.index()[["width", "height"]][row])
    gc.collect()


def test_dalis_own_reader_finds_every_sample_by_our_idx(packed: Manifest) -> None:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=21, num_threads=1, device_id=None)
    def pipeline(index_paths: list[str]):
        return tuple(fn.readers.webdataset(paths=shard_paths(packed), index_paths=index_paths, ext=["jpg", "cls"]))

    pipe = pipeline([path.replace(".tar", ".idx") for path in shard_paths(packed)])
    pipe.build()
    images, labels = pipe.run()
    found = [(bytes(images.at(i)), int(bytes(labels.at(i)).decode("ascii"))) for i in range(21)]
    assert found == expected(packed)
    assert pipe.reader_meta()  # the index alone told DALI the size of the epoch
    assert next(iter(pipe.reader_meta().values()))["epoch_size"] == 21


@leaves_files_open
def test_timm_reads_a_split_by_name_from_its_index(packed: Manifest) -> None:
    dataset = timm.data.create_dataset("wds/fastssl", root=str(packed.root.parent), split="train", is_training=False)
    assert len(dataset) == 21
    found = [(np.asarray(image), label) for image, label in dataset]
    for (pixels, label), (payload, wanted) in zip(found, expected(packed), strict=True):
        assert label == wanted
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(payload)).convert("RGB")))
    gc.collect()


HUGGING_FACE = """
import io, json, sys
import datasets
shards, cache = sys.argv[1:-1], sys.argv[-1]
data = datasets.load_dataset("webdataset", data_files={"train": shards}, split="train", cache_dir=cache)
data = data.cast_column("jpg", datasets.Image(decode=False))
print(json.dumps([[row["jpg"]["bytes"].hex(), int(row["cls"]), row["json"]["name"]] for row in data]))
"""


def test_hugging_face_datasets_reads_the_shards_offline(packed: Manifest, tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", HUGGING_FACE, *shard_paths(packed), str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert packed.classes is not None
    assert [(bytes.fromhex(image), label) for image, label, _ in rows] == expected(packed)
    assert all(name.partition("/")[0] == packed.classes[label] for _, label, name in rows)
