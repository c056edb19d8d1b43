"""How fast `shard_tools pack` is, beside Pillow's decode of the same files, which a pack that checks cannot beat.

The command is run as a user runs it, in a process of its own, so that its start counts and this process's libraries do
not. The decode has the files in memory and one thread a worker: Pillow releases the GIL while it decodes.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image

from fastssl.bench.rates import cpu_s
from fastssl.bench.record import Figure
from pipelines.loader import available_cores
from pipelines.reader import Reader, whole
from shard_tools.headers import FORMATS
from shard_tools.manifest import Manifest

_UNITS = {"images_per_s": "images/s", "mb_per_s": "MB/s", "cpu_ms_per_image": "ms/image"}


def worker_counts(most: int) -> list[int]:
    """1, 2, 4, ... and `most`; 0 means the cores of this process."""
    most = most or available_cores()
    return sorted({*(2**i for i in range(most.bit_length())), most})


def measure_pack(
    src: str, shards: str, split: str, most_images: int, most_workers: int, rounds: int
) -> tuple[dict[str, Figure], int]:
    """Figures "pack/N_workers/..." and "decode/N_workers/images_per_s" for N = 1, 2, 4, ...; and how many images.

    src         class folders or, where it is empty, the samples of `shards` are packed again
    most_images     of the source; they are held in memory for the decode
    Shards go to the system's temporary folder. Raises ValueError with what the packer said where it failed.
    """
    if not (src or shards):
        raise ValueError("mode=pack has nothing to pack; give bench.src=FOLDER of class folders, or data.root=SHARDS")
    source = ["imagefolder", src] if src else ["webdataset", str(Manifest.load(shards, split).root)]
    command = [*source, "--split", split, "--limit", str(most_images)]
    files = _packed_files(command, split)  # which also brings the source into the page cache
    rounds_of: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        rounds_of.setdefault(name, []).append(value)

    num, num_bytes = len(files), sum(map(len, files))
    for _ in range(rounds):
        for workers in worker_counts(most_workers):
            decode_s, _ = _timed(partial(_decode, files, workers))
            with tempfile.TemporaryDirectory(prefix="fastssl-bench-") as dst:
                pack_s, used_s = _timed(partial(_pack, command, dst, workers))
            note(f"decode/{workers}_workers/images_per_s", num / decode_s)
            note(f"pack/{workers}_workers/images_per_s", num / pack_s)
            note(f"pack/{workers}_workers/mb_per_s", num_bytes / pack_s / 1e6)
            note(f"pack/{workers}_workers/cpu_ms_per_image", 1000 * used_s / num)
            note(f"pack/{workers}_workers/share_of_decode", decode_s / pack_s)
            alone = rounds_of["pack/1_workers/images_per_s"][-1]
            note(f"pack/{workers}_workers/efficiency", num / pack_s / workers / alone)
    units = {name: _UNITS.get(name.rpartition("/")[2], "share") for name in rounds_of}
    return {name: Figure(units[name], tuple(values)) for name, values in rounds_of.items()}, num


def limit(figures: dict[str, Figure]) -> str:
    """One sentence on the largest number of workers."""
    workers = max(int(name.split("/")[1].split("_")[0]) for name in figures)
    share, efficiency = (figures[f"pack/{workers}_workers/{name}"].median for name in ("share_of_decode", "efficiency"))
    cause = "the decode" if share >= 0.8 else "what comes beside the decode: start, reading, hashing, writing"
    more = f", each at {efficiency:.0%} of the rate of one alone" if workers > 1 else ""
    return f"limit: {cause}; pack reaches {share:.0%} of a bare decode with {workers} worker(s){more}"


def _packed_files(command: Sequence[str], split: str) -> list[bytes]:
    with tempfile.TemporaryDirectory(prefix="fastssl-bench-") as dst:
        _pack(command, dst, workers=1)
        manifest = Manifest.load(dst, split)
        reader = Reader(manifest)
        try:
            parts = reader.request(np.arange(manifest.num_samples))
            return whole(image for part in parts for image in part.result())
        finally:
            reader.close()


def _pack(command: Sequence[str], dst: str, workers: int) -> None:
    kind, src, *options = command
    arguments = ["pack", kind, src, dst, *options, "--workers", str(workers)]
    done = subprocess.run([sys.executable, "-m", "shard_tools", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(done.stderr.strip().splitlines()[-1].removeprefix("error: "))


def _decode(files: Sequence[bytes], threads: int) -> None:
    def decode_one(file: bytes) -> None:
        Image.open(io.BytesIO(file), formats=FORMATS).load()

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(decode_one, files):
            pass


def _timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall time, and of CPU time of this process and those that ended in it."""
    began, cpu_began = time.perf_counter(), cpu_s(children=True)
    work()
    return time.perf_counter() - began, cpu_s(children=True) - cpu_began
