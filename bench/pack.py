"""How fast `shard_tools pack` and `verify --full` are beside what they cannot do without: decoding, and hashing.

    python -m bench.pack PHOTOS --copies 64 --rounds 3 --json bench/results/pack_MACHINE.json

Packing as `fastssl-bench mode=pack` measures it, and then what one process pays to verify such shards, beside sha256
and crc32 of their bytes. `--copies` repeats the photographs under other names: the start of the packer's processes
counts as much as a few hundred images do.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fastssl.bench.packing import measure_pack
from fastssl.bench.record import Figure, Record
from shard_tools import checksum
from shard_tools.manifest import Manifest
from shard_tools.pack import PackOptions, pack
from shard_tools.sources import imagefolder
from shard_tools.verify import check

_WINDOW_BYTES = 2**19  # hashed at a time


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("photos", type=Path, help="class folders of images")
    parser.add_argument("--copies", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for the copies (default: the system's)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        tree = copies(arguments.photos, Path(scratch) / "photos", arguments.copies)
        num = sum(path.is_file() for path in tree.rglob("*"))
        figures, _ = measure_pack(str(tree), "", "train", num, arguments.workers, arguments.rounds)
        figures |= measure_verify(tree, Path(scratch) / "shards", arguments.rounds)
    for name, figure in figures.items():
        print(f"{name:42s} {figure.median:10.3f} {figure.unit}  {min(figure.rounds):.3f} to {max(figure.rounds):.3f}")
    if arguments.json:
        words = [f"--{name} {getattr(arguments, name)}" for name in ("copies", "workers", "rounds")]
        record = Record(
            what="packing photographs as they are beside decoding alone, verifying them beside hashing alone",
            command=" ".join(["python -m bench.pack PHOTOS", *words]),
            figures=figures,
            settings={"photos": arguments.photos.name, "images": num},
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


def measure_verify(tree: Path, shards: Path, rounds: int) -> dict[str, Figure]:
    """Megabytes that one process reads in a second of its CPU time, with all checks and with the hashes alone."""
    pack(imagefolder.open_source(tree, "train"), shards, PackOptions(workers=2))
    manifest = Manifest.load(shards)
    hash_shards(manifest)  # brings them into the page cache
    gc.collect()
    gc.freeze()  # torch's objects, which this process has and `shard_tools verify` has not
    megabytes = sum(shard.num_bytes for shard in manifest.shards) / 1e6
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, work in (("verify_full", verify), ("hashes_alone", hash_shards)):
            began = time.process_time()
            work(manifest)
            rates.setdefault(name, []).append(megabytes / (time.process_time() - began))
    return {f"{name}/cpu_mb_per_s": Figure("MB/s", tuple(each)) for name, each in rates.items()}


def verify(manifest: Manifest) -> None:
    faults = check(manifest, full=True)
    assert not faults, faults


def hash_shards(manifest: Manifest) -> None:
    """Reading, sha256 and crc32 of all bytes, and nothing else: what no check can do without."""
    window = memoryview(bytearray(_WINDOW_BYTES))
    for shard in manifest.shards:
        digest = hashlib.sha256()
        with (manifest.root / shard.name).open("rb", buffering=0) as file:
            while count := file.readinto(window):
                digest.update(window[:count])
                checksum.crc32(window[:count])


if __name__ == "__main__":
    sys.exit(main())
