"""A small run of every method, for tests that kill and resume them: 8 images a step, 7 steps an epoch."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shard_tools.pack import PackOptions, pack
from shard_tools.sources import hdf5
from tests.shards import write_split

NUM, BATCH, STEPS_PER_EPOCH = 61, 8, 7

_COMMON = ["run.device=cpu", f"run.batch_size={BATCH}", "run.log_every=1", "run.save_every=2steps", "run.threads=1",
           "loader.threads=1", "run.precision=fp32"]  # fmt: skip
_RESNET = ["encoder=resnet10_narrow", "encoder.width=0.25", "encoder.stem=small"]
_MOMENTUM = [*_RESNET, "method.queue_length=20", "method.split_groups=2"]
_MOCO = [*_MOMENTUM, "views.query.size=32"]
_CLSA = [*_MOMENTUM, "views.key.size=32", "views.strong.size=16"]
_SWAV = [*_RESNET, "method.num_prototypes=20", "method.hidden=16", "views.global.size=32", "views.local.size=16",
         "views.local.count=2", "method.queue_length=16", "method.queue_from=3steps"]  # fmt: skip
_STAMPS = ["encoder=stamps_small", "encoder.channels=2", "encoder.conv.side=12",
           "encoder.conv.layers=[[4,3,2],[6,3,1]]", "encoder.conv.features=8", "method.dim=8",
           "method.decoder.channels=2", "method.decoder.start=[4,6]", "method.decoder.layers=[[4,3,2]]",
           "data.mean=[0,0]", "data.std=[1,1]", "views.query.size=12"]  # fmt: skip
_SIDES = (32, 28, 24, 20, 16)

FORMS = {
    "moco_v1": ["method=moco_v1", *_MOCO],
    "moco_v2": ["method=moco_v2", *_MOCO],
    "moco_symmetric": ["method=moco_v2", *_MOCO, "method.symmetric=true"],
    "clsa_single": ["method=clsa_single", *_CLSA],
    "clsa_multi": [
        "method=clsa_multi", *_MOMENTUM, "views.key.size=32",
        *(f"views.{kind}_{px}.size={side}" for kind in ("query", "strong")
          for px, side in zip((224, 192, 160, 128, 96), _SIDES)),
    ],
    "clsa_sym": ["method=clsa_sym", *_CLSA],
    "swav": ["method=swav", *_SWAV],
    "unmix_moco": ["method=unmix_moco", *_MOCO],
    "unmix_swav": ["method=unmix_swav", *_SWAV],
    "moco_decoder": ["method=moco_decoder", "method.queue_length=20", "method.split_groups=2", *_STAMPS],
    "autoencoder": ["method=autoencoder", *_STAMPS],
    "moco_bf16": ["method=moco_v2", *_MOCO, "run.precision=bf16"],
    "moco_fp16": ["method=moco_v2", *_MOCO, "run.precision=fp16"],
    "moco_watched": ["method=moco_v2", *_MOCO, "online=linear", "knn=cifar", "knn.every=3steps", "knn.k=5"],
}  # fmt: skip


def settings(form: str, data: Path, run_dir: Path, steps: int, *more: str) -> list[str]:
    """`data` is what `write_data` wrote."""
    root = data / ("stamps" if form in ("moco_decoder", "autoencoder") else "photos")
    return [*_ordered(FORMS[form]), f"data.root={root}", f"run.dir={run_dir}", f"run.duration={steps}steps", *more]


def _ordered(form: list[str]) -> list[str]:
    """Choices of files first, and what the form says behind what all have in common."""
    named = {setting.partition("=")[0]: setting for setting in [*_COMMON, *form]}
    return list(named.values())


def write_data(root: Path, files: list[tuple[str, bytes]]) -> Path:
    """photos: labelled images as train and test; stamps: blobs in noise, of two bands."""
    for split in ("train", "test"):
        write_split(root / "photos", files, [i % 4 for i in range(len(files))], split=split)
    import h5py

    rng = np.random.default_rng(5)
    y, x = np.mgrid[:20, :20]
    blobs = [40 * np.exp(-((y - a) ** 2 + (x - b) ** 2) / 8) for a, b in rng.uniform(6, 14, (NUM, 2))]
    with h5py.File(root / "stamps.h5", "w") as file:
        file["images"] = np.stack([rng.normal(size=(2, 20, 20)) + blob for blob in blobs]).astype(np.float32)
        file["labels"] = np.arange(NUM) % 2
    pack(hdf5.open_source(root / "stamps.h5", "train"), root / "stamps", PackOptions(shard_size=20))
    return root
