"""From a folder of images through the real packer to batches: what is packed is what is seen."""

from __future__ import annotations

import numpy as np
from PIL import Image
from torchvision import transforms

from pipelines.augment import AugmentSpec
from pipelines.loader import Loader
from pipelines.views import ViewSpec
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import imagefolder


def test_a_packed_folder_gives_its_pixels_and_labels(tiny_files, tmp_path):
    for i, (suffix, payload) in enumerate(tiny_files):
        folder = tmp_path / "images" / f"class{i % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:03d}.{suffix}").write_bytes(payload)
    source = imagefolder.open_source(tmp_path / "images", "train")
    manifest = pack(source, tmp_path / "shards", PackOptions(shard_size=13)).manifest

    view = ViewSpec("whole", 24, crop="center", resize=24, augment=AugmentSpec(flip_p=0.0))
    with Loader(manifest, [view], batch_size=61, seed=0, backend="exact") as loader:
        batch = next(loader.batches())
    pixels = batch.views["whole"][0].permute(0, 2, 3, 1).numpy()
    found = [(int(label), image.tobytes()) for label, image in zip(batch.labels, pixels)]

    square = transforms.Compose([transforms.Resize(24), transforms.CenterCrop(24)])
    expected = []
    for path in (tmp_path / "images").rglob("*.*"):
        image = np.asarray(square(Image.open(path).convert("RGB")))
        expected.append((int(path.parent.name.removeprefix("class")), image.tobytes()))
    assert sorted(found) == sorted(expected)
