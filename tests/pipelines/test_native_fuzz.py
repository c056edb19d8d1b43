"""Damaged files and random numbers through the kernel, compiled under address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, _imaging

from pipelines.native import build, kernel

ROUNDS = int(os.environ.get("FASTSSL_FUZZ_ROUNDS", "800"))
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs fuzz_native.c; arguments as it describes them, but for the library."""
    folder = tmp_path_factory.mktemp("sanitized")
    library, program = folder / "libviews.so", folder / "fuzz"
    build.build(library, SANITIZERS)
    source = Path(__file__).with_name("fuzz_native.c")
    command = ["cc", *SANITIZERS, f"-I{build.HERE}", str(source), str(library), "-ldl", "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "ASAN_OPTIONS": "detect_leaks=1"}

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        # Pillow's module knows where its libjpeg lies; by itself it cannot be loaded without Python's symbols.
        command = [str(program), _libjpeg(), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)

    return run


def _libjpeg() -> str:
    """The file of the libjpeg that this process has from Pillow."""
    folders = (Path(_imaging.__file__).parent, Path(_imaging.__file__).parents[1] / "pillow.libs")
    maps = Path("/proc/self/maps").read_text().split()
    found = [word for word in maps if "libjpeg" in word]
    ours = [word for word in found if Path(word).parent in folders]
    return (ours or found)[0]


@pytest.fixture(scope="module")
def files(photos: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, made = tmp_path_factory.mktemp("files"), []
    for i, photo in enumerate(photos):
        small = photo.resize((150 + i, 110 - 7 * i))
        forms: list[tuple[Image.Image, dict[str, Any]]] = [(small, {"subsampling": k}) for k in range(3)]
        forms += [(small, {"progressive": True}), (small, {"keep_rgb": True}), (small.convert("L"), {})]
        forms += [(small.convert("CMYK"), {}), (small.resize((3, 2)), {}), (small, {"restart_marker_blocks": 4})]
        for place, (image, options) in enumerate(forms):
            made.append(folder / f"{i}-{place}.jpg")
            image.save(made[-1], "JPEG", quality=85, **options)
    return made


def test_whole_and_damaged_files_do_no_harm(
    fuzz: Callable[..., subprocess.CompletedProcess[str]], files: list[Path]
) -> None:
    done = fuzz(ROUNDS, 1, *files)
    assert done.returncode == 0, done.stderr
    by_kernel, by_libjpeg = map(int, done.stdout.split())
    assert by_libjpeg > ROUNDS // 4  # so they were not all refused at the door
    if kernel.Kernel().instructions != "plain":
        assert by_kernel > ROUNDS // 4
