"""What fault tests share: a fork server, and data for a run with a monitor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.fastssl.evaluate.conftest import patches
from tests.faults.lives import ForkServer
from tests.shards import write_split


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    with ForkServer(tmp_path_factory.mktemp("lives")) as server:
        yield server


@pytest.fixture(scope="session")
def monitored_shards(photos: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Splits for a run with a kNN monitor: 61 patches in train, 31 in test."""
    root = tmp_path_factory.mktemp("monitored")
    write_split(root, *patches(photos, 61, seed=1))
    write_split(root, *patches(photos, 31, seed=2), split="test")
    return root
