"""A labelled train and test split of photo patches, and the checkpoint of an encoder that was never trained."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fastssl import checkpoint, config
from fastssl.nn.encoder import build_encoder
from tests.shards import encode, write_split

STEP = 7


def patches(photos, num, seed):
    """Pairs of (suffix, bytes) and labels: 40 px patches of the photographs, label = which one."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(num) % len(photos)).tolist()
    files = []
    for label in labels:
        left, top = (int(rng.integers(0, side - 120)) for side in photos[label].size)
        box = (left, top, left + 120, top + 120)
        files.append(("jpg", encode(photos[label].resize((40, 40), Image.Resampling.BILINEAR, box))))
    return files, labels


@pytest.fixture(scope="session")
def patch_shards(photos, tmp_path_factory):
    """train: 61 patches, test: 31."""
    root = tmp_path_factory.mktemp("patches")
    write_split(root, *patches(photos, 61, seed=1))
    write_split(root, *patches(photos, 31, seed=2), split="test")
    return root


@pytest.fixture
def run_dir(tmp_path, patch_shards):
    """A run whose only checkpoint, at step 7, holds a narrow ResNet-10 with batch norm statistics of its own."""
    overrides = [
        "encoder=resnet10_narrow",
        "encoder.width=0.25",
        "views.query.size=24",
        "data.mean=[0.4,0.5,0.6]",
        f"data.root={patch_shards}",
    ]
    cfg = config.load(overrides)
    torch.manual_seed(3)
    model = nn.ModuleDict({"encoder": build_encoder(**dataclasses.asdict(cfg.encoder))})
    model.train()
    with torch.no_grad():
        model["encoder"](torch.randn(64, 3, 24, 24))
    meta = {"config": config.plain(cfg), "backbone_prefix": "encoder."}
    checkpoint.save(tmp_path / "run", STEP, model, {}, meta, keep=2)
    return tmp_path / "run"
