"""Shared fixtures: real photographs, a tiny packed data set with and without labels, a seeded generator."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image

from tests.faults.record import Recorder
from tests.shards import encode, write_split

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")  # CC0 or public domain, inside the wheel
NUM_SAMPLES = 61  # odd, so that every batch size leaves a tail


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a shell's background job, and its children
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if path := os.environ.get("FASTSSL_RECORD_FAULTS"):
        config.pluginmanager.register(Recorder(Path(path)), "fault-recorder")


@pytest.fixture(scope="session", autouse=True)
def untuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test takes loader settings that `fastssl-bench mode=tune` found for whoever runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTSSL_TUNED", str(tmp_path_factory.mktemp("untuned")))
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Four RGB photographs of 300 to 640 px."""
    folder = Path(skimage.__file__).parent / "data"
    return [Image.open(folder / name).convert("RGB") for name in PHOTOS]


@pytest.fixture(scope="session")
def tiny_files(photos: list[Image.Image]) -> list[tuple[str, bytes]]:
    """61 patches of the photographs, 33 to 96 px a side: mostly JPEG; every seventh PNG, every ninth grayscale.

    Patch i comes from photograph i % 4.
    """
    rng = np.random.default_rng(0)
    files = []
    for i in range(NUM_SAMPLES):
        photo = photos[i % len(photos)]
        width, height = rng.integers(33, 97, 2).tolist()
        left = int(rng.integers(0, photo.width - 2 * width))
        top = int(rng.integers(0, photo.height - 2 * height))
        patch = photo.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + 2 * width, top + 2 * height))
        suffix = "png" if i % 7 == 3 else "jpg"
        files.append((suffix, encode(patch.convert("L") if i % 9 == 5 else patch, suffix)))
    return files


@pytest.fixture(scope="session")
def tiny_shards(tiny_files: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed `train` split of 61 labelled samples in 4 shards: `Manifest.load(tiny_shards)`. Do not write to it.

    The label is the photograph that a patch comes from.
    """
    root = tmp_path_factory.mktemp("tiny")
    write_split(root, tiny_files, [i % len(PHOTOS) for i in range(NUM_SAMPLES)])
    return root


@pytest.fixture(scope="session")
def tiny_shards_unlabelled(tiny_files: list[tuple[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 61 samples without labels."""
    root = tmp_path_factory.mktemp("tiny_unlabelled")
    write_split(root, tiny_files)
    return root
