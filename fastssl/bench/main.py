"""fastssl-bench: how fast the data path, the training step, both, and packing are, and what limits each."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from fastssl import config, dist, tuned
from fastssl.bench import compare, packing, stages, tables, tuning
from fastssl.bench.rates import Part, Rig, bottleneck, measure_rounds
from fastssl.bench.record import Figure, Record, machine
from fastssl.settings import Config, require
from fastssl.train import set_threads
from pipelines.backends import chosen
from pipelines.loader import available_cores

SLOWER = 3  # exit code
PARTS: dict[str, tuple[Part, ...]] = {"loader": ("loader",), "step": ("step",), "train": ("loader", "step", "train")}

HELP = """
fastssl-bench: how fast it is, where the time goes, and what limits it

  fastssl-bench mode=train method=moco_v2 data.root=SHARDS run.batch_size=64 bench.json=bench.json
  fastssl-bench mode=loader data.root=SHARDS bench.json=new.json bench.against=old.json

  mode=loader   views made and thrown away, and what each stage costs: read, decode, crop, colour,
                blur, strong draws, write-out
  mode=step     training on synthetic views, no data needed
  mode=train    loader, step and both in turn: the share of the step's rate that is reached, and
                the wait for data
  mode=pack     shard_tools pack with 1, 2, 4, ... workers beside a strict decode of the same files:
                bench.src=FOLDER of class folders, or data.root=SHARDS
  mode=tune     finds loader.backend, loader.threads and loader.prefetch, and writes them where
                training on this machine looks for them

  bench.seconds=20       of measuring in all, for each part       bench.rounds=3   all are kept
  bench.against=FILE     compare with an earlier result           bench.tolerance=0.03
  bench.workers=0        mode=pack: at most so many (0: cores)     bench.images=2000   mode=pack
  bench.objective=auto|train|loader      mode=tune: what is to be fast
  every setting of fastssl-train is understood as well
exit codes: 0 done, 2 a setting or the data is wrong, or bench.against cannot be compared with,
            3 slower than bench.against by more than the spread
"""


@dataclass(frozen=True)
class BenchConfig:
    """How to measure.

    seconds     of measuring in all, for each part of a mode, after `warmup_steps` steps that do not count
    rounds      over which the seconds are spread
    json        where the result goes
    against     an earlier result to compare with; "" compares with none
    tolerance   share of a figure by which it must change to be called faster or slower
    src, images, workers    mode=pack: class folders to pack, the most images, the most workers (0: the cores)
    objective   mode=tune: what is to be fast (see tuning.tune)
    """

    seconds: float = 20.0
    rounds: int = 3
    warmup_steps: int = 3
    json: str = "bench.json"
    against: str = ""
    tolerance: float = 0.03
    src: str = ""
    images: int = 2000
    workers: int = 0
    objective: Literal["auto", "train", "loader"] = "auto"

    def __post_init__(self) -> None:
        require(self.seconds > 0, "bench.seconds", self.seconds, "above 0")
        require(self.rounds >= 1, "bench.rounds", self.rounds, "1 or more")
        require(self.warmup_steps >= 1, "bench.warmup_steps", self.warmup_steps, "1 or more")
        require(0 <= self.tolerance < 1, "bench.tolerance", self.tolerance, "a share of 0 or more and below 1")
        require(self.images >= 1, "bench.images", self.images, "1 or more")
        require(self.workers >= 0, "bench.workers", self.workers, "0 (the cores) or more")


def main(argv: list[str] | None = None) -> int:
    return config.run_command(_command, HELP, argv)


def _command(overrides: list[str]) -> int:
    tree = config.compose("bench", overrides)
    mode = config.convert_value(Literal["loader", "step", "train", "pack", "tune"], tree.pop("mode"), "mode")
    bench = config.convert(BenchConfig, tree.pop("bench"), "bench")
    if tree["data"]["root"] == "???" and (mode == "step" or (mode == "pack" and bench.src)):
        tree["data"]["root"] = ""
    cfg = config.convert(Config, tree)
    console = Console(highlight=False)
    try:
        device = dist.setup(cfg.run.device)
        hardware = {**machine(), "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None}
        old = _earlier(bench, mode, hardware)
        set_threads(cfg, device)
        record = run(cfg if mode == "tune" else tuned.fill(cfg), mode, bench, device, overrides, hardware)
    finally:
        rank = dist.rank()
        dist.teardown()
    if rank != 0:
        return 0
    record.save(Path(bench.json))
    tables.show(record, console)
    console.print(f"written to {bench.json}", soft_wrap=True)
    if old is None:
        return 0
    found = compare.compare(old, record, bench.tolerance)
    tables.show_comparison(found, compare.differing(old, record), bench.against, console)
    return SLOWER if any(one.verdict == compare.SLOWER for one in found) else 0


def run(
    cfg: Config,
    mode: str,
    bench: BenchConfig,
    device: torch.device,
    overrides: list[str],
    hardware: Mapping[str, Any],
) -> Record:
    """Measure `mode` on this rank. Raises what the loader, the method and the packer raise."""
    settings: dict[str, Any] = {"mode": mode, "rounds": bench.rounds, "seconds": bench.seconds}
    figures, note = _measured(cfg, mode, bench, device, settings)
    return Record(
        what=_what(cfg, mode, device),
        command=shlex.join(["fastssl-bench", *overrides]),
        figures=figures,
        settings={
            **settings,
            "ranks": dist.world(),
            "compute_threads": torch.get_num_threads(),
            "data": _data(cfg),
            "config": config.plain(cfg),
        },
        machine=hardware,
        note=note,
    )


def _measured(
    cfg: Config, mode: str, bench: BenchConfig, device: torch.device, settings: dict[str, Any]
) -> tuple[dict[str, Figure], str]:
    """The figures of a mode and its sentence; what else was chosen goes into `settings`."""
    if mode == "pack":
        figures, settings["images"] = packing.measure_pack(
            bench.src, cfg.data.root, cfg.data.split, bench.images, bench.workers, bench.rounds
        )
        return figures, packing.limit(figures)
    rig = Rig(cfg, device, bench.warmup_steps)
    if mode == "tune":
        return _tune(cfg, bench, device, rig)
    figures = measure_rounds(rig, PARTS[mode], bench.seconds, bench.rounds)
    if mode != "loader":
        return figures, bottleneck(figures)
    figures |= stages.measure_stages(cfg, device, bench.seconds, bench.rounds)
    return figures, stages.limit(figures, cfg.loader.threads or available_cores())


def _tune(cfg: Config, bench: BenchConfig, device: torch.device, rig: Rig) -> tuple[dict[str, Figure], str]:
    def say(line: str) -> None:
        if dist.rank() == 0:
            print(line, file=sys.stderr)

    choice = tuning.tune(cfg, device, rig, bench.objective, bench.seconds, bench.rounds, say)
    best = choice.best
    found = tuned.Tuned(
        method=str(cfg.method["name"]),
        machine=tuned.this_machine(cfg),
        views=tuned.views_digest(cfg),
        **dataclasses.asdict(best),
        objective=choice.objective,
        images_per_s=choice.finalists[best].median,
        date=datetime.date.today().isoformat(),
    )
    path = tuned.save(found) if dist.rank() == 0 else tuned.path_of(found)
    note = (
        f"chosen of {choice.tried}: loader.backend={best.backend} loader.threads={best.threads}"
        f" loader.prefetch={best.prefetch}, for {'training' if choice.objective == 'train' else 'the loader alone'};"
        f" runs of {found.method} on this machine take them from {path} where they leave them open"
    )
    return {f"tune/{one.name}/images_per_s": figure for one, figure in choice.finalists.items()}, note


def _earlier(bench: BenchConfig, mode: str, hardware: Mapping[str, Any]) -> Record | None:
    """bench.against, checked before any time is spent on measuring."""
    if not bench.against:
        return None
    old = Record.load(Path(bench.against))
    compare.require_comparable(old, mode, hardware)
    return old


def _what(cfg: Config, mode: str, device: torch.device) -> str:
    if mode == "pack":
        return "shard_tools pack"
    views = ", ".join(f"{s.count} {s.role} {s.size} px" for s in cfg.view_specs())
    what = f"{mode} of {cfg.method['name']} ({views}), batch {cfg.run.batch_size}"
    if mode in ("step", "tune"):
        return what
    backend = chosen(cfg.loader.backend, str(device), cfg.data.manifest().bands)
    return f"{what}, views by {backend} on {cfg.loader.threads or available_cores()} thread(s)"


def _data(cfg: Config) -> dict[str, Any]:
    if not cfg.data.root:
        return {}
    manifest = cfg.data.manifest()
    return {"samples": manifest.num_samples, "digest": manifest.digest}
