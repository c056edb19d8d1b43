"""Images per second of the loader alone, of compute alone on synthetic views, and of both; the limit is named."""

from __future__ import annotations

import dataclasses
import itertools
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastssl import config, dist
from fastssl.bench import record
from fastssl.schedule import Clock
from fastssl.settings import Config, require
from fastssl.train import Training, open_loader, set_threads, to_device, view_output
from pipelines.loader import Batch
from pipelines.synthetic import SyntheticLoader
from pipelines.views import num_views
from shard_tools.manifest import Manifest

STEPS_PER_EPOCH = 5004  # ImageNet at batch 256: a bench has no epochs, but settings of a method may count them

HELP = """
fastssl-bench: images per second of the data path, of the training step, and of both; the bottleneck is named

  fastssl-bench mode=train method=moco_v2 data.root=SHARDS run.batch_size=64 bench.seconds=20 bench.json=bench.json

  mode=loader   views made and thrown away     mode=step   training on synthetic views, no data needed
  mode=train    loader, step and both in turn  every setting of fastssl-train is understood as well
"""


@dataclass(frozen=True)
class BenchConfig:
    """seconds of measuring per mode after `warmup_steps` steps that do not count; json: where the result goes."""

    seconds: float = 20.0
    warmup_steps: int = 3
    json: str = "bench.json"

    def __post_init__(self) -> None:
        require(self.seconds > 0, "bench.seconds", self.seconds, "above 0")
        require(self.warmup_steps >= 1, "bench.warmup_steps", self.warmup_steps, "1 or more")


@dataclass(frozen=True)
class Rate:
    """One measurement over `steps` steps of the global batch. step_s are seconds per step; cpu_ms_per_image is user and
    system time of this process, all threads, per image of this rank; data_wait is the share of wall time."""

    images_per_s: float
    steps: int
    step_s_median: float
    step_s_p95: float
    cpu_ms_per_image: float
    data_wait: float
    views_per_s: float
    megapixels_per_s: float


def main(argv: list[str] | None = None) -> int:
    return config.run_command(_command, HELP, argv)


def _command(overrides: list[str]) -> int:
    tree = config.compose("bench", overrides)
    mode = config.convert_value(Literal["loader", "step", "train"], tree.pop("mode"), "mode")
    bench = config.convert(BenchConfig, tree.pop("bench"), "bench")
    if mode == "step" and tree["data"]["root"] == "???":
        tree["data"]["root"] = ""
    cfg = config.convert(Config, tree)
    try:
        result = run(cfg, mode, bench)
    finally:
        dist.teardown()
    if dist.rank() == 0:
        Path(bench.json).write_text(json.dumps(result, indent=1) + "\n")
        _print(result, bench)
    return 0


def run(cfg: Config, mode: str, bench: BenchConfig) -> dict[str, Any]:
    """{"loader": rate, "step": rate, "train": rate} of the modes measured, `bottleneck`, and the conditions."""
    device = dist.setup(cfg.run.device)
    set_threads(cfg, device)
    rates: dict[str, Rate] = {}
    if mode in ("loader", "train"):
        manifest = Manifest.load(cfg.data.root, cfg.data.split)
        with open_loader(cfg, manifest, device) as loader:
            rates["loader"] = measure(cfg, bench, loader.batches(), lambda step, batch: None)
    if mode in ("step", "train"):
        training = Training.build(cfg, device, Clock(STEPS_PER_EPOCH, cfg.run.batch_size))

        def train_step(step: int, batch: Batch) -> None:
            output = training.step(to_device(batch, cfg, device), step, cfg.optim.lr)
            if device.type == "cuda":
                output.loss.item()  # the clock must see the end of the step, not of its launch

        with _synthetic(cfg, device) as synthetic:
            # One batch again and again: making random pixels is not what is measured.
            rates["step"] = measure(cfg, bench, itertools.repeat(next(synthetic.batches())), train_step)
        if mode == "train":
            with open_loader(cfg, manifest, device) as loader:
                rates["train"] = measure(cfg, bench, loader.batches(), train_step)
    return {
        **{name: dataclasses.asdict(rate) for name, rate in rates.items()},
        "bottleneck": bottleneck(rates),
        "config": config.plain(cfg),
        "machine": _conditions(),
    }


def measure(cfg: Config, bench: BenchConfig, batches: Iterator[Batch], work: Callable[[int, Batch], None]) -> Rate:
    """Time `work` on batches for bench.seconds; all ranks stop together."""
    durations: list[float] = []
    waited_s = began = cpu_began = 0.0
    for step in itertools.count():
        if step == bench.warmup_steps:
            dist.barrier()
            waited_s, began, cpu_began = 0.0, time.perf_counter(), _cpu_s()
        step_began = time.perf_counter()
        batch = next(batches)
        waited_s += time.perf_counter() - step_began
        work(step, batch)
        if step >= bench.warmup_steps:
            durations.append(time.perf_counter() - step_began)
            if dist.any_rank(time.perf_counter() - began >= bench.seconds):
                break
    elapsed, cpu_s, images = time.perf_counter() - began, _cpu_s() - cpu_began, len(durations) * cfg.run.batch_size
    specs = cfg.view_specs()
    durations.sort()
    return Rate(
        images_per_s=images / elapsed,
        steps=len(durations),
        step_s_median=durations[len(durations) // 2],
        step_s_p95=durations[int(0.95 * (len(durations) - 1))],
        cpu_ms_per_image=1000 * cpu_s / (images / dist.world()),
        data_wait=waited_s / elapsed,
        views_per_s=images * num_views(specs) / elapsed,
        megapixels_per_s=images * sum(s.count * s.size**2 for s in specs) / elapsed / 1e6,
    )


def bottleneck(rates: dict[str, Rate]) -> str:
    """One sentence: what limits training, and what the other half could do."""
    if not {"loader", "step"} <= rates.keys():
        return "not known: mode=train measures loader and step together"
    loader, step = rates["loader"].images_per_s, rates["step"].images_per_s
    slow, fast = ("the loader", "the step") if loader < step else ("the step", "the loader")
    return f"{slow}: alone it does {min(loader, step):.0f} images/s, {fast} {max(loader, step):.0f}"


def _synthetic(cfg: Config, device: torch.device) -> SyntheticLoader:
    return SyntheticLoader(
        cfg.view_specs(),
        batch_size=cfg.run.batch_size,
        rank=dist.rank(),
        world=dist.world(),
        seed=cfg.run.seed,
        channels=cfg.encoder.channels,
        output=view_output(cfg, device),
        device=str(device),
    )


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _conditions() -> dict[str, Any]:
    return {
        **record.machine(),
        **record.versions(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ranks": dist.world(),
        "compute_threads": torch.get_num_threads(),
    }


def _print(result: dict[str, Any], bench: BenchConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("", "images/s", "views/s", "step s", "p95 s", "CPU ms/image", "data wait"):
        table.add_column(column, justify="left" if not column else "right")
    for name in ("loader", "step", "train"):
        if name in result:
            r = result[name]
            table.add_row(
                name, f"{r['images_per_s']:.1f}", f"{r['views_per_s']:.1f}",
                f"{r['step_s_median']:.3f}", f"{r['step_s_p95']:.3f}", f"{r['cpu_ms_per_image']:.2f}",
                f"{r['data_wait']:.1%}",
            )  # fmt: skip
    Console().print(table)
    print(f"bottleneck: {result['bottleneck']}\nwritten to {bench.json}")
