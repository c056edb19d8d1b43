"""The loader beside what a user would pick instead: the same images, the same views, the same cores, round by round.

    python -m bench.loader --data IMAGEFOLDER                              all of it, five rounds of MoCo v2 and SwAV
    python -m bench.loader --data IMAGEFOLDER --steps prepare fidelity     the peers' environment, shards, pixel errors
    python -m bench.loader --data IMAGEFOLDER --steps rounds --views swav --rounds 1 --append
                                               one round more, where a machine is idle for minutes only
    python -m bench.loader --data IMAGEFOLDER --steps report               tables and figure again

A peer is a program of its own in `bench/peers/`, in an environment of its own (`bench/peers/.venv`, made here). A round
starts every program anew, one at a time, and begins with another one than the round before; a program warms up, then
counts for --seconds. A ratio is formed within a round. All goes to `bench/results/loader_<date>_<machine>.json`; with
--append to the rounds that the file has, provided that it was taken under the same conditions.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fastssl.bench import record
from fastssl.bench.record import Figure, Record
from pipelines.backends import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / "bench" / "peers"
STEPS = ("prepare", "fidelity", "rounds", "report")
VIEWS = {"moco_v2": "MoCo v2, 2×224", "swav": "SwAV, 2×224 + 6×96", "clsa_multi": "CLSA multi, 1 + 5 weak + 5 strong"}
BASELINE, CEILING = "torchvision_pillow", "pure_decode"
SHORT_SIDE = 256
WARMUP_BATCHES = 2  # of every worker: the first of each come together, after all the imports
ROUND_LIMIT_S = 200.0

Results = Mapping[str, Mapping[str, float]]  # program -> images_per_s, cpu_ms_per_image, start_s


@dataclass(frozen=True)
class Program:
    """What to run: a module of `bench.peers` with arguments, on "original" or "short" shards (a peer that takes the
    folder leaves the shards alone), in the peers' environment or in this one; `views` are those that it can make."""

    label: str
    module: str
    arguments: tuple[str, ...] = ()
    shards: str = "original"
    ours: bool = False
    views: tuple[str, ...] = ("moco_v2", "swav")

    def command(self, data: Data, *more: object) -> list[str]:
        python = sys.executable if self.ours else str(PEERS / ".venv" / "bin" / "python")
        return [
            *(python, "-W", "ignore", "-m", f"bench.peers.{self.module}", *self.arguments),
            *("--folder", str(data.folder), "--shards", str(data.shards(self.shards)), *map(str, more)),
        ]


def programs() -> dict[str, Program]:
    """name -> program, in the order of the tables."""
    every = tuple(VIEWS)
    found = {
        "torchvision_pillow": Program("torchvision on Pillow, DataLoader", "torchvision_pillow", views=every),
        "torchvision_tensor": Program("torchvision v2 on tensors", "torchvision_tensor"),
        "webdataset": Program("webdataset + torchvision on Pillow", "webdataset_torchvision"),
        "lightly": Program("lightly", "lightly_transforms"),
        "albumentations": Program("albumentations", "albumentations_opencv"),
        "kornia": Program("kornia", "kornia_tensor"),
        "dali_sololearn": Program("DALI as solo-learn uses it", "dali_sololearn"),
        "spdl": Program("SPDL + torchvision v2 on tensors", "spdl_torchvision"),
        "webdataset_short": Program(
            f"webdataset + torchvision, shorter side {SHORT_SIDE}", "webdataset_torchvision", shards="short"
        ),
    }
    for backend in BACKENDS:
        if backend != "stamps":
            for shards, suffix in (("original", ""), ("short", f", shorter side {SHORT_SIDE}")):
                found[f"fastssl_{backend}{'_short' if suffix else ''}"] = Program(
                    f"fastssl, {backend}{suffix}", "fastssl_loader", ("--backend", backend), shards, True, every
                )
    found["fastssl_native_float32"] = Program(
        "fastssl, native, float32 as the peers give",
        "fastssl_loader",
        ("--backend", "native", "--output", "float32"),
        ours=True,
        views=every,
    )
    found[CEILING] = Program("libjpeg-turbo decode alone", "pure_decode", views=every)
    return found


@dataclass(frozen=True)
class Data:
    """The images as a folder of class folders, and packed twice below `packed`."""

    folder: Path
    packed: Path

    @classmethod
    def at(cls, data: Path, work: Path) -> Data:
        """Raises ValueError if `data` holds no images in class folders, by itself or in `train`."""
        folder = (data / "train" if (data / "train").is_dir() else data).resolve()
        files = _files(folder)
        if not files:
            raise ValueError(f"--data {data} holds no files in class folders; give an image folder")
        listing = "".join(f"{path}:{path.stat().st_size}\n" for path in files)
        return cls(folder, work / f"{data.resolve().name}-{hashlib.sha256(listing.encode()).hexdigest()[:12]}")

    def shards(self, kind: str) -> Path:
        return self.packed / kind / "train"

    def describe(self) -> dict[str, Any]:
        """Name, number and size of the images: what a reader has to know of them."""
        files = _files(self.folder)
        some = files[:: max(1, len(files) // 1000)]
        sizes = sorted((width * height, f"{width}×{height}") for width, height in map(_size_px, some))
        name = self.folder.parent.name if self.folder.name == "train" else self.folder.name
        total = sum(path.stat().st_size for path in files)
        return {
            "data": name,
            "images": len(files),
            "kilobytes_per_image": round(total / len(files) / 1000),
            "median_size_px": sizes[len(sizes) // 2][1],
        }


def main(argv: Sequence[str] | None = None) -> int:
    known = programs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of class folders, or one that has it as train/"
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--views", nargs="+", choices=VIEWS, default=("moco_v2", "swav"))
    parser.add_argument("--peers", nargs="+", choices=known, default=tuple(known))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0, help="that count, of a program in a round")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="threads, or worker processes")
    parser.add_argument("--append", action="store_true", help="to the rounds that the results file has")
    parser.add_argument("--out", type=Path, help="results file (default: bench/results/loader_<date>_<machine>.json)")
    parser.add_argument("--image", type=Path, default=ROOT / "docs" / "images" / "loader_peers.png")
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "bench_loader", help="where the shards go")
    options = parser.parse_args(argv)
    try:
        _run(options, {name: known[name] for name in known if name in options.peers})
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace, chosen: Mapping[str, Program]) -> None:
    data = Data.at(options.data, options.work)
    if "prepare" in options.steps:
        prepare(data, len(_files(data.folder)))
    settings = data.describe() | {
        key: getattr(options, key) for key in ("batch", "workers", "seconds")
    } | {"warmup_batches_per_worker": WARMUP_BATCHES}  # fmt: skip
    fresh = Record(
        what="images per second of data loaders that make the same views from the same photographs",
        command="python -m bench.loader --data IMAGEFOLDER",
        figures={},
        settings=settings,
        versions=record.versions() | _peer_versions(),
    )
    path = options.out or default_path(fresh)
    if set(options.steps) == {"report"}:
        kept = Record.load(path)  # which may be of another machine or commit
    else:
        kept = continued(path, fresh) if options.append and path.exists() else fresh
    if "fidelity" in options.steps:
        kept = _measure_fidelity(kept, chosen, data)
        kept.save(path)
    if "rounds" in options.steps:
        for _ in range(options.rounds):
            for views in options.views:
                able = {name: program for name, program in chosen.items() if views in program.views}
                results = run_round(rotated(able, num_rounds(kept.figures, views)), data, views, settings)
                kept = dataclasses.replace(kept, figures=extended(kept.figures, round_figures(views, results)))
                kept.save(path)  # after every round, so that a stop costs one
    if "report" in options.steps:
        from bench.loader_report import draw, tables

        print(tables(kept, programs(), VIEWS))
        draw(kept, programs(), VIEWS, options.image)
        print(f"written to {path} and {options.image}")


def prepare(data: Data, num_images: int) -> None:
    """The peers' environment as requirements.txt pins it, and the shards, where they are not there already."""
    wanted, have = (PEERS / "requirements.txt").read_text(), PEERS / ".venv" / "requirements.txt"
    if not have.exists() or have.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", PEERS / ".venv"], check=True)
        python = str(PEERS / ".venv" / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet", "-r", str(PEERS / "requirements.txt")]
        subprocess.run(pip, check=True)
        have.write_text(wanted)
    for kind, resize in (("original", ()), ("short", ("--short-side", str(SHORT_SIDE)))):
        if not (data.shards(kind) / "manifest.json").exists():
            # webdataset shares out whole shards to its workers, so there must be some.
            size = ("--split", "train", "--shard-size", str(min(1000, max(1, num_images // 8))))
            pack = (sys.executable, "-m", "shard_tools", "pack", "imagefolder", data.folder, data.packed / kind)
            subprocess.run([*pack, *size, *resize], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def run_round(
    able: Mapping[str, Program], data: Data, views: str, settings: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Every program once. Raises ValueError naming the first that fails, so that a round is whole or not there."""
    results = {}
    for name, program in able.items():
        numbers = [x for key in ("batch", "workers", "seconds") for x in (f"--{key}", settings[key])]
        began = time.time()
        first, rate = _json_lines(
            name, program.command(data, "--views", views, "--warmup", settings["warmup_batches_per_worker"], *numbers)
        )
        results[name] = {
            "images_per_s": rate["images_per_s"],
            "cpu_ms_per_image": rate["cpu_ms_per_image"],
            "start_s": first["first_batch_at"] - began,
        }
        print(f"{views} {name}: {rate['images_per_s']:.0f} images/s", file=sys.stderr, flush=True)
    return results


def round_figures(views: str, results: Results) -> dict[str, tuple[str, float]]:
    """figure -> (unit, value) of one round: the results, `ratio` to the baseline and `share_of_decode`, where the round
    has these two."""
    figures: dict[str, tuple[str, float]] = {}
    for name, result in results.items():
        path = f"{views}/{name}"
        figures[f"{path}/images_per_s"] = ("images/s", result["images_per_s"])
        figures[f"{path}/cpu_ms_per_image"] = ("ms/image", result["cpu_ms_per_image"])
        figures[f"{path}/start_s"] = ("s", result["start_s"])
        for reference, key in ((BASELINE, "ratio"), (CEILING, "share_of_decode")):
            if reference in results:
                figures[f"{path}/{key}"] = ("x", result["images_per_s"] / results[reference]["images_per_s"])
    return figures


def extended(figures: Mapping[str, Figure], new: Mapping[str, tuple[str, float]]) -> dict[str, Figure]:
    """`figures` with one round more."""
    rounds = {name: (*figures[name].rounds, value) if name in figures else (value,) for name, (_, value) in new.items()}
    return {**figures, **{name: Figure(new[name][0], rounds[name]) for name in new}}


def rotated(able: Mapping[str, Program], by: int) -> dict[str, Program]:
    """The programs in their order, begun `by` places later: no one always comes after the same neighbour's heat."""
    names = list(able)
    return {name: able[name] for name in names[by % len(names) :] + names[: by % len(names)]} if names else {}


def num_rounds(figures: Mapping[str, Figure], views: str) -> int:
    return max((len(figure.rounds) for name, figure in figures.items() if name.startswith(f"{views}/")), default=0)


def continued(path: Path, fresh: Record) -> Record:
    """The record at `path`. Raises ValueError, naming it, for a condition in which `fresh` differs from it."""
    kept = Record.load(path)
    for key in ("settings", "versions", "machine", "commit"):
        old, new = getattr(kept, key), getattr(fresh, key)
        if key == "settings":
            old = {name: value for name, value in old.items() if name != "peers"}
        if old != new:
            changed = [name for name in {**old, **new} if old.get(name) != new.get(name)] if key != "commit" else []
            raise ValueError(
                f"{path} was taken with another {key} ({', '.join(changed) or f'{old}, this is {new}'}); measure anew"
                " without --append, or give another --out"
            )
    return kept


def default_path(fresh: Record) -> Path:
    """loader_<date>_<processor>_<cores>_cores.json, in bench/results."""
    words = re.findall(r"[a-z0-9]+", fresh.machine["cpu"].lower())
    name = next((w for w in words if w not in ("intel", "amd", "r", "tm", "cpu", "processor", "core")), "cpu")
    return ROOT / "bench" / "results" / f"loader_{fresh.date}_{name}_{fresh.machine['cores']}_cores.json"


def _measure_fidelity(kept: Record, chosen: Mapping[str, Program], data: Data) -> Record:
    """The record with "fidelity/<program>/<operation>", and each program's words about itself in its settings."""
    peers, figures = dict(kept.settings.get("peers", {})), dict(kept.figures)
    for name, program in chosen.items():
        (peers[name],) = _json_lines(name, program.command(data, "--describe"))
        if program.shards == "original":  # the operations are those of the same program
            (found,) = _json_lines(name, program.command(data, "--fidelity"))
            for operation, error in found["errors"].items():
                figures[f"fidelity/{name}/{operation}"] = Figure("grey levels", (error,))
    return dataclasses.replace(kept, settings={**kept.settings, "peers": peers}, figures=figures)


def _json_lines(name: str, command: Sequence[str]) -> list[dict[str, Any]]:
    """What a program prints. Raises ValueError with its last words if it fails or takes too long."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=ROUND_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"{name} took more than {ROUND_LIMIT_S:.0f} s; leave it out with --peers") from None
    except FileNotFoundError:
        raise ValueError(f"{command[0]} is not there; run --steps prepare first") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ValueError(f"{name} failed ({last}); repeat it by hand: {' '.join(command)}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _peer_versions() -> dict[str, str]:
    """ "peer/package" -> version, as the requirements pin it and `prepare` installed it."""
    pins = (line.partition("==") for line in (PEERS / "requirements.txt").read_text().splitlines() if "==" in line)
    return {f"peer/{name}": version for name, _, version in pins}


def _size_px(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/*") if path.is_file())


if __name__ == "__main__":
    sys.exit(main())
