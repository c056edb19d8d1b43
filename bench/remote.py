"""What a distant store costs the loader: local shards beside the same shards over HTTP with a latency, in turn.

    python -m bench.remote SHARDS bench/results/remote_NAME.json

SHARDS is a packed data set of 16 shards or more. The server is a process of its own on the same cores, so that what it
uses is taken from the loader. Measured after a warm-up of one epoch:

    local       from the folder
    kept        whole shards, in a cache that holds all of them
    passing     whole shards, in a cache of two windows and a shard: every epoch fetches each of them again
    near        the same from a server without latency: beside `passing`, what the latency itself costs
    ranges      a request an image
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastssl import config
from fastssl.bench.record import Figure, Record, versions
from pipelines.loader import Loader
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest
from shard_tools.remote import Access

VARIANTS = ("local", "kept", "passing", "near", "ranges")


@dataclass(frozen=True)
class Result:
    """first_batch_s: from opening the loader on an empty cache; images_per_s: after the warm-up."""

    images_per_s: float
    first_batch_s: float


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shards", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--latency-ms", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=36, help="measured, of each loader in each round (default: 36)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--window", type=int, default=3)
    parser.add_argument("--backend", default="native")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args(argv)
    specs = config.load(["method=moco_v2", "data.root=x", "run.dir=x"]).view_specs()
    results: dict[str, list[Result]] = {name: [] for name in VARIANTS}
    with _server(arguments.shards, arguments.latency_ms) as distant, _server(arguments.shards, 0.0) as near:
        for _ in range(arguments.rounds):
            for name, rounds in results.items():
                url = {"local": str(arguments.shards), "near": near}.get(name, distant)
                rounds.append(_measure(name, url, specs, arguments))
    manifest = Manifest.load(arguments.shards)
    Record(
        what=f"MoCo v2 views from local shards, and over HTTP with {arguments.latency_ms:g} ms before each answer",
        command=f"python -m bench.remote SHARDS {arguments.out} --threads {arguments.threads}"
        f" --steps {arguments.steps}",
        figures=_figures(results),
        settings={
            **{key: value for key, value in vars(arguments).items() if key not in ("shards", "out")},
            "num_samples": manifest.num_samples,
            "num_shards": len(manifest.shards),
            "num_bytes": sum(shard.num_bytes for shard in manifest.shards),
            "order": "window",
            "passing_cache_bytes": _cache_bytes(manifest, arguments.window),
        },
        versions=versions(("fastssl-train", "torch", "numpy", "fsspec", "aiohttp")),
    ).save(arguments.out)


def _measure(name: str, url: str, specs: Sequence[ViewSpec], arguments: argparse.Namespace) -> Result:
    num_bytes = _cache_bytes(Manifest.load(arguments.shards), None if name == "kept" else arguments.window)
    with tempfile.TemporaryDirectory() as cache:
        began = time.perf_counter()
        access = Access("ranges" if name == "ranges" else "shards", cache, num_bytes / 1e9)
        with Loader(
            Manifest.load(url, access=access),
            specs,
            batch_size=arguments.batch,
            seed=0,
            backend=arguments.backend,
            threads=arguments.threads,
            order="window",
            window=arguments.window,
        ) as loader:
            batches = loader.batches()
            next(batches)
            first_batch_s = time.perf_counter() - began
            for _ in itertools.islice(batches, loader.steps_per_epoch):
                pass
            began = time.perf_counter()
            for _ in itertools.islice(batches, arguments.steps):
                pass
            elapsed = time.perf_counter() - began
    return Result(arguments.steps * arguments.batch / elapsed, first_batch_s)


def _cache_bytes(manifest: Manifest, window: int | None) -> int:
    """Room for two windows and a shard; for all of them if `window` is None."""
    num_shards = len(manifest.shards) if window is None else 2 * window + 1
    return num_shards * max(shard.num_bytes for shard in manifest.shards)


def _figures(results: dict[str, list[Result]]) -> dict[str, Figure]:
    figures = {}
    for name, rounds in results.items():
        figures[f"{name}/images_per_s"] = Figure("images/s", tuple(r.images_per_s for r in rounds))
        figures[f"{name}/first_batch_s"] = Figure("s", tuple(r.first_batch_s for r in rounds))
        figures[f"{name}/of_local"] = _ratio(rounds, results["local"])
    figures["passing/of_near"] = _ratio(results["passing"], results["near"])
    return figures


def _ratio(rounds: Sequence[Result], others: Sequence[Result]) -> Figure:
    return Figure("x", tuple(one.images_per_s / other.images_per_s for one, other in zip(rounds, others)))


@contextlib.contextmanager
def _server(folder: Path, latency_ms: float) -> Iterator[str]:
    command = [sys.executable, "-m", "bench.range_server", str(folder), "--latency-ms", str(latency_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


if __name__ == "__main__":
    main()
