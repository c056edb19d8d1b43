"""How fast `shard_tools pack` and `verify --full` are beside what they cannot do without: decoding, and hashing.

    python -m bench.pack PHOTOS --copies 6 --rounds 5 --json bench/results/pack_MACHINE.json

Per round, one after the other and each over the same files from the page cache: Pillow's open and load alone in one
process and in `--workers`, and a whole pack (start of its processes, shards, hashes, fsync and manifest included) with
as many; then what one process pays to verify such shards, beside sha256 and crc32 of their bytes. `--copies` repeats
the photographs under other names, so that the start of processes does not count for much.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from fastssl.bench.record import Figure, Record
from shard_tools.images import Resize
from shard_tools.manifest import Manifest
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import imagefolder
from shard_tools.verify import check

_WINDOW_BYTES = 2**19  # hashed at a time
_DECODE_CHUNK = 16  # files a task, as the packer has it


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", type=Path, help="class folders of images")
    parser.add_argument("--copies", type=int, default=6)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--short-side", type=int, default=0, help="also pack with this resize")
    parser.add_argument("--scratch", type=Path, help="folder for the copies and the shards (default: the system's)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        tree = copies(arguments.photos, Path(scratch) / "photos", arguments.copies)
        figures, settings = measure(tree, arguments)
    for name, figure in figures.items():
        print(f"{name:42s} {figure.median:10.3f} {figure.unit}  {min(figure.rounds):.3f} to {max(figure.rounds):.3f}")
    if arguments.json:
        chosen = ("copies", "workers", "rounds", "shard_size", "short_side")
        words = [f"--{name.replace('_', '-')} {getattr(arguments, name)}" for name in chosen]
        record = Record(
            what="packing photographs as they are beside decoding alone, verifying them beside hashing alone",
            command=" ".join(["python -m bench.pack PHOTOS", *words]),
            figures=figures,
            settings=settings,
        )
        record.save(arguments.json)
    return 0


def copies(photos: Path, tree: Path, number: int) -> Path:
    """`photos` `number` times over, in the same class folders; every file is read when this returns."""
    for path in sorted(path for path in photos.rglob("*") if path.is_file()):
        for copy in range(number):
            target = tree / path.relative_to(photos).with_stem(f"{path.stem}_{copy}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return tree


def measure(tree: Path, arguments: argparse.Namespace) -> tuple[dict[str, Figure], dict[str, Any]]:
    """Figures, and the settings that say what they are of."""
    workers, shard_size, short_side = arguments.workers, arguments.shard_size, arguments.short_side
    paths = [path for path in sorted(tree.rglob("*")) if path.is_file()]
    seconds: dict[str, list[float]] = {}
    verified: dict[str, list[float]] = {}
    shards = tree.with_name("shards")
    pack(imagefolder.open_source(tree, "train"), shards, PackOptions(shard_size, workers=workers))
    for _ in range(arguments.rounds):
        for name, rate in {"verify_full": verify_rate(shards), "hashes_alone": hash_rate(shards)}.items():
            verified.setdefault(name, []).append(rate)
        for number in sorted({1, workers}):
            seconds.setdefault(f"decode/{number}", []).append(decode_seconds(paths, number))
            seconds.setdefault(f"pack/{number}", []).append(pack_seconds(tree, PackOptions(shard_size, workers=number)))
        if short_side:
            name = f"pack_short_side_{short_side}/{workers}"
            options = PackOptions(shard_size, workers=workers, resize=Resize(short_side=short_side))
            seconds.setdefault(name, []).append(pack_seconds(tree, options))
    rates = {name: [len(paths) / each for each in taken] for name, taken in seconds.items()}
    figures = {f"{name}_workers/images_per_s": Figure("images/s", tuple(each)) for name, each in rates.items()}
    for number in sorted({1, workers}):
        share = [p / d for p, d in zip(rates[f"pack/{number}"], rates[f"decode/{number}"])]
        figures[f"pack/{number}_workers/share_of_decode"] = Figure("x", tuple(share))
    if workers > 1:
        for what in ("decode", "pack"):
            ratio = [many / one / workers for many, one in zip(rates[f"{what}/{workers}"], rates[f"{what}/1"])]
            figures[f"{what}/{workers}_workers/efficiency"] = Figure("x", tuple(ratio))
    figures |= {f"{name}/cpu_megabytes_per_s": Figure("MB/s", tuple(each)) for name, each in verified.items()}
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    settings = {"photos": arguments.photos.name, "files": len(paths), "megabytes": round(megabytes, 1)}
    return figures, {**settings, "copies": arguments.copies, "workers": workers, "shard_size": shard_size}


def decode_seconds(paths: Sequence[Path], workers: int) -> float:
    """Pillow's open and load of every file in `workers` processes that are up already; 1 is this process."""
    if workers == 1:
        began = time.perf_counter()
        for path in paths:
            decode(path)
        return time.perf_counter() - began
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(time.sleep, [0.5] * workers))  # or the start of the processes would be counted
        began = time.perf_counter()
        list(pool.map(decode, paths, chunksize=_DECODE_CHUNK))
        return time.perf_counter() - began


def decode(path: Path) -> None:
    with Image.open(path) as image:
        image.load()


def pack_seconds(tree: Path, options: PackOptions) -> float:
    """One whole pack, the listing of the files included."""
    with tempfile.TemporaryDirectory(dir=tree.parent) as shards:
        began = time.perf_counter()
        pack(imagefolder.open_source(tree, "train"), Path(shards), options)
        return time.perf_counter() - began


def verify_rate(shards: Path) -> float:
    """Megabytes that `verify --full` reads in a second of one process's CPU time."""
    manifest = Manifest.load(shards)
    began = time.process_time()
    faults = check(manifest, full=True)
    taken = time.process_time() - began
    assert not faults, faults
    return sum(shard.num_bytes for shard in manifest.shards) / 1e6 / taken


def hash_rate(shards: Path) -> float:
    """The same of reading, sha256 and crc32 of the same bytes, and nothing else: what no check can do without."""
    window = memoryview(bytearray(_WINDOW_BYTES))
    num_bytes = 0
    began = time.process_time()
    for path in sorted(shards.rglob("*.tar")):
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(window):
                num_bytes += count
                digest.update(window[:count])
                zlib.crc32(window[:count])
    return num_bytes / 1e6 / (time.process_time() - began)


if __name__ == "__main__":
    sys.exit(main())
