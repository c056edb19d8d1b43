"""What a run pays before its first batch on a very large split, and what a step of it costs beside a small split's.

    python -m bench.startup bench/results/scale_startup_NAME.json [--shards 10000 --samples 14000000]

The splits are hollow: manifest.json and index.npy are true and have as many rows as they say, but each shard holds one
small photograph, to which all of its rows point; the rest of it is a hole in the file system. So everything is done as
in a run, up to batches, except that the bytes read are few. A round measures each split in a process of its own, whose
greatest resident memory counts, with libraries and mapped index. All files are in the page cache: a cold disk adds the
time to read an index of 36 bytes a sample, and a network's file system a request a shard.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from fastssl.bench.record import Figure, Record, versions
from shard_tools.manifest import INDEX_DTYPE, INDEX_NAME, MANIFEST_NAME, Manifest, Shard, sha256_of

BATCH = 256
_NUM_STEPS = 20  # that count, of a round
_HEADER_BYTES = 512
_MEAN_MEMBER_BYTES = 110 * 1024  # of the photographs that the holes stand for
_SIZE_PX = (160, 120)  # of the one photograph
_PIECE = 2**18  # rows written at a time


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="results file; without it the figures are printed only")
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=14_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="measure the split there, in this process")
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return 0
    sizes = {"large": (options.shards, options.samples), "small": (options.shards // 100, options.samples // 100)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (num_shards, num_samples) in sizes.items():
            write_hollow_split(Path(folder) / name, num_shards, num_samples)
        rounds = [_round(Path(folder), list(sizes)) for _ in range(options.rounds)]
    record = Record(
        what=f"start and steps of a run on {options.shards:,} shards with {options.samples:,} samples",
        command=f"python -m bench.startup FILE --shards {options.shards} --samples {options.samples}",
        figures={name: Figure(_unit(name), tuple(found[name] for found in rounds)) for name in rounds[0]},
        settings={
            "splits": {name: {"shards": shards, "samples": samples} for name, (shards, samples) in sizes.items()},
            **{"method": "moco_v2", "backend": "native", "order": "global", "batch": BATCH, "steps": _NUM_STEPS},
        },
        versions=versions(("fastssl-train", "torch", "numpy")),
    )
    for name, figure in record.figures.items():
        print(f"{name:24} {figure.median:8.3f} {figure.unit}")
    if options.out:
        record.save(options.out)
    return 0


def write_hollow_split(root: Path, num_shards: int, num_samples: int) -> Manifest:
    """A split `train` below `root`, of which every row is the same photograph; it passes the quick check."""
    folder = root / "train"
    folder.mkdir(parents=True)
    image = _photograph()
    ends = np.array([num_samples * (i + 1) // num_shards for i in range(num_shards)])
    shards = []
    for i, count in enumerate(np.diff(ends, prepend=0).tolist()):
        shard = Shard(f"train-{i:06d}.tar", count * _MEAN_MEMBER_BYTES + _HEADER_BYTES + len(image), count, "0" * 64)
        shards.append(shard)
        with (folder / shard.name).open("wb") as file:
            file.seek(_HEADER_BYTES)
            file.write(image)
            file.truncate(shard.num_bytes)
    _write_index(folder / INDEX_NAME, ends, image)
    manifest = Manifest(
        root=folder,
        split="train",
        shards=tuple(shards),
        classes=None,
        num_samples=num_samples,
        census={},
        source={"kind": "hollow"},
        options={},
        index_sha256=sha256_of(folder / INDEX_NAME),
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return manifest


def measure(root: Path) -> dict[str, float]:
    """figure -> seconds, milliseconds or GB, as its name says, of one start and the steps behind it.

    start_s is what a run waits for its first batch: import, manifest, loader (which checks the split) and the first
    batch (which needs the order). check_quick_s and order_s are these two parts by themselves, done once more, and
    windowed_order_s is what loader.order=window needs instead.
    """
    figures: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        figures[name] = time.perf_counter() - began

    with timed("import_s"):
        from fastssl import config
        from pipelines.loader import Loader
        from pipelines.order import order, windowed_order
    specs = config.load(["method=moco_v2", "data.root=x", "run.dir=x"]).view_specs()
    with timed("manifest_s"):
        manifest = Manifest.load(root)
    with timed("check_quick_s"):
        assert manifest.check_quick() == []
    with timed("order_s"):
        order(manifest.num_samples, 0, 1)
    with timed("windowed_order_s"):
        windowed_order([shard.num_samples for shard in manifest.shards], 0, 1)
    with timed("loader_s"):
        loader = Loader(manifest, specs, batch_size=BATCH, seed=0, backend="native")
    with loader:
        batches = loader.batches()
        with timed("first_batch_s"):
            next(batches)
        for _ in range(_NUM_STEPS // 2):  # warm-up
            next(batches)
        with timed("steps_s"):
            for _ in range(_NUM_STEPS):
                next(batches)
    figures["step_ms"] = 1000 * figures.pop("steps_s") / _NUM_STEPS
    figures["start_s"] = sum(figures[name] for name in ("import_s", "manifest_s", "loader_s", "first_batch_s"))
    figures["resident_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return figures


def _round(folder: Path, names: Sequence[str]) -> dict[str, float]:
    found = {}
    for name in names:
        command = [sys.executable, "-m", "bench.startup", "--measure", str(folder / name)]
        measured = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
        found.update({f"{name}/{figure}": value for figure, value in measured.items()})
    return {**found, "step_ratio": found["large/step_ms"] / found["small/step_ms"]}


def _unit(figure: str) -> str:
    return {"s": "s", "ms": "ms", "gb": "GB", "ratio": "x"}[figure.rpartition("_")[2]]


def _photograph() -> bytes:
    """A smooth picture in colour as a JPEG."""
    width, height = _SIZE_PX
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 17 + phase) * np.cos(y / 23 - phase) for phase in (0.0, 1.0, 2.0)]
    file = io.BytesIO()
    Image.fromarray(np.uint8(127.5 + 127 * np.stack(waves, axis=-1))).save(file, "JPEG", quality=90)
    return file.getvalue()


def _write_index(path: Path, ends: np.ndarray, image: bytes) -> None:
    rows = np.lib.format.open_memmap(path, "w+", INDEX_DTYPE, (int(ends[-1]),), version=(1, 0))
    for first in range(0, len(rows), _PIECE):
        piece = np.zeros(min(_PIECE, len(rows) - first), INDEX_DTYPE)
        piece["shard"] = np.searchsorted(ends, np.arange(first, first + len(piece)), "right")
        piece["offset"], piece["size"], piece["crc32"] = _HEADER_BYTES, len(image), zlib.crc32(image)
        piece["width"], piece["height"] = _SIZE_PX
        piece["label"] = -1
        rows[first : first + len(piece)] = piece
    rows.flush()


if __name__ == "__main__":
    sys.exit(main())
