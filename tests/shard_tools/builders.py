"""Small images, trees of them, and hashes of trees, for the tests of this room."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from shard_tools.manifest import MANIFEST_NAME, Manifest, sha256_of

ROOT = Path(__file__).parents[2]


def picture(seed: int, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    """A smooth random image: compresses like a photograph, and differs from seed to seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def jpeg(seed: int, size: tuple[int, int] = (40, 30)) -> bytes:
    return encode(picture(seed, size), quality=90)


def plant(root: Path, files: Mapping[str, bytes]) -> Path:
    """Write `files` below `root`, which is returned."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def class_tree(root: Path, per_class: int = 7, classes: tuple[str, ...] = ("ant", "bee", "cat")) -> Path:
    """root/<class>/<number>.jpg"""
    files = {
        f"{name}/{i:03d}.jpg": jpeg(100 * number + i, (24 + i, 20))
        for number, name in enumerate(classes)
        for i in range(per_class)
    }
    return plant(root, files)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` by its path."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def payloads(manifest: Manifest) -> list[bytes]:
    """The images of a split, read by nothing but the index."""
    return [
        manifest.shard_path(int(row["shard"])).read_bytes()[int(row["offset"]) : int(row["offset"] + row["size"])]
        for row in manifest.index()
    ]


def shell(*words: object, code: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m shard_tools ...` in a process of its own; its exit code must be `code`."""
    command = [sys.executable, "-m", "shard_tools", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def sign_again(split: Path) -> None:
    """Make the manifest agree with the files as they are, as if the damage were older than the pack."""
    manifest = Manifest.load(split)
    folder = manifest.root
    shards = tuple(
        replace(
            shard,
            num_bytes=(folder / shard.name).stat().st_size,
            sha256=sha256_of(folder / shard.name),
            idx_sha256=sha256_of(folder / shard.idx_name),
        )
        for shard in manifest.shards
    )
    signed = replace(manifest, shards=shards, index_sha256=sha256_of(folder / "index.npy"))
    (folder / MANIFEST_NAME).write_bytes(signed.to_bytes())
