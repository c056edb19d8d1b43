"""Damaged files by the thousand: shards, indexes and images end in typed errors, never in a crash or a hang."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shard_tools.cli import main
from tests.faults.record import REPOSITORY, times
from tests.shard_tools.builders import encode, jpeg, picture, plant

MOST_MB = 1500  # resident, of which the libraries take a half
TIMEOUT_S = 3600


def run(status: Path, module: str, folder: Path, *words: object) -> int:
    """Run a fuzzing process to its end; the most megabytes that it had. Fails with the seed if it died."""
    status.write_bytes(bytes(20))
    command = [
        sys.executable,
        "-X",
        "faulthandler",
        "-m",
        f"tests.faults.{module}",
        str(folder),
        str(status),
        *map(str, words),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"at seed {status.read_text()}: {done.returncode}\n{done.stderr[-3000:]}"
    return int(done.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six labelled images in two shards."""
    root = tmp_path_factory.mktemp("fuzz")
    images = {f"src/{name}/{i}.jpg": jpeg(i, (16, 12)) for i, name in enumerate("aabbc")}
    plant(root, {**images, "src/c/5.png": encode(picture(5, (16, 12)), "PNG")})
    words = ["pack", "imagefolder", str(root / "src"), str(root / "dst"), "--shard-size", "3", "--workers", "1"]
    assert main(words) == 0
    return root / "dst"


@pytest.mark.fault(
    "mutated tars, indexes, manifests and .idx files, half of them signed again",
    "a typed error or good bytes; verify finds what was not signed; no crash, no second of work",
)
def test_mutated_shards_end_in_typed_errors(small: Path, tmp_path: Path, record_property) -> None:
    count, every = 100_000, times(50, 1)
    most = run(tmp_path / "status", "fuzz_shards", small, count, every)
    assert most < MOST_MB
    record_property("seen", f"{count} mutations, {count // every} through every command; no crash, at most {most} MB")


@pytest.mark.fault(
    "mutated JPEG, PNG, WebP and BMP files in the shards of a training",
    "every batch is whole in every backend; no crash, no hang, no growth",
)
def test_mutated_images_never_stop_a_training(tmp_path: Path, record_property) -> None:
    counts = {"native": times(384, 10_000), "exact": times(128, 2560), "dali": times(128, 2560)}
    if importlib.util.find_spec("nvidia") is None:
        del counts["dali"]
    words = [f"{backend}={count}" for backend, count in counts.items()]
    most = run(tmp_path / "status", "fuzz_images", tmp_path / "shards", *words)
    assert most < MOST_MB
    record_property("seen", f"files: {', '.join(words)}; no crash, at most {most} MB")
