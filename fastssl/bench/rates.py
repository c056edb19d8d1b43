"""Images per second of the loader alone, of the step alone on synthetic views, and of both together.

Each is measured once a round, one after another, so that a slow minute of the machine meets all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fastssl import dist
from fastssl.bench.record import Figure
from fastssl.schedule import Clock
from fastssl.settings import Config
from fastssl.train import open_loader
from fastssl.training import Training, to_device, view_output
from pipelines.loader import Batch
from pipelines.synthetic import SyntheticLoader
from pipelines.views import num_views

STEPS_PER_EPOCH = 5004  # ImageNet at batch 256: a bench has no epochs, but settings of a method may count them
UNITS = {
    "images_per_s": "images/s", "views_per_s": "views/s", "megapixels_per_s": "Mpx/s", "steps": "steps",
    "step_s_median": "s", "step_s_p95": "s", "cpu_ms_per_image": "ms/image", "data_wait": "share waiting",
}  # fmt: skip

Part = Literal["loader", "step", "train"]


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


class Rig:
    """Measures the parts of a run one at a time; the method is built once, a loader for every measurement.

    A loader that lived on would make batches ahead while another part is being measured.
    """

    def __init__(self, cfg: Config, device: torch.device, warmup_steps: int) -> None:
        self._cfg, self._device, self._warmup_steps = cfg, device, warmup_steps
        self._training: Training | None = None

    def measure(self, part: Part, seconds: float, cfg: Config | None = None) -> Rate:
        """`cfg` may have other loader settings than the run's. Raises what the loader and the method raise."""
        cfg = cfg or self._cfg
        work = (lambda step, batch: None) if part == "loader" else self._train_step
        if part == "step":
            with synthetic(cfg, self._device) as loader:
                # One batch again and again: making random pixels is not what is measured.
                return measure(cfg, seconds, self._warmup_steps, itertools.repeat(next(loader.batches())), work)
        manifest = cfg.data.manifest()
        with open_loader(cfg, manifest, self._device) as loader:
            return measure(cfg, seconds, self._warmup_steps, loader.batches(), work)

    def _train_step(self, step: int, batch: Batch) -> None:
        cfg = self._cfg
        if self._training is None:
            self._training = Training.build(cfg, self._device, Clock(STEPS_PER_EPOCH, cfg.run.batch_size))
        output = self._training.step(to_device(batch, cfg, self._device), step, cfg.optim.lr)
        if self._device.type == "cuda":
            output.loss.item()  # the clock must see the end of the step, not of its launch


def measure_rounds(rig: Rig, parts: Sequence[Part], seconds: float, rounds: int) -> dict[str, Figure]:
    """`seconds` of each part in all, spread over the rounds, as figures named "part/quantity"."""
    measured: dict[Part, list[Rate]] = {part: [] for part in parts}
    for _ in range(rounds):
        for part in parts:
            measured[part].append(rig.measure(part, seconds / rounds))
    return figures(measured)


def figures(measured: Mapping[Part, Sequence[Rate]]) -> dict[str, Figure]:
    """All quantities of all rounds, and the share of the step's rate that training reaches, round by round."""
    named = {
        f"{part}/{quantity.name}": Figure(
            UNITS[quantity.name], tuple(float(getattr(rate, quantity.name)) for rate in rates)
        )
        for part, rates in measured.items()
        for quantity in dataclasses.fields(Rate)
    }
    if {"step", "train"} <= measured.keys():
        pairs = zip(measured["train"], measured["step"], strict=True)
        named["train/share_of_ceiling"] = Figure("share", tuple(t.images_per_s / s.images_per_s for t, s in pairs))
    return named


def bottleneck(rates: Mapping[str, Figure]) -> str:
    """One sentence: what limits training, what the other half could do, and what both together reach."""
    if not {"loader/images_per_s", "step/images_per_s"} <= rates.keys():
        return ""
    loader, step = rates["loader/images_per_s"].median, rates["step/images_per_s"].median
    slow, fast = ("the loader", "the step") if loader < step else ("the step", "the loader")
    both = rates["train/images_per_s"].median
    return (
        f"limit: {slow}, which alone does {min(loader, step):.0f} images/s, {fast} {max(loader, step):.0f}; together"
        f" {both:.0f}, which is {rates['train/share_of_ceiling'].median:.0%} of the step alone, with"
        f" {rates['train/data_wait'].median:.0%} of the time spent waiting for data"
    )


def measure(
    cfg: Config, seconds: float, warmup_steps: int, batches: Iterator[Batch], work: Callable[[int, Batch], None]
) -> Rate:
    """Time `work` on batches for `seconds` after the warm-up; all ranks stop together."""
    durations: list[float] = []
    waited_s = began = cpu_began = 0.0
    for step in itertools.count():
        if step == warmup_steps:
            dist.barrier()
            waited_s, began, cpu_began = 0.0, time.perf_counter(), cpu_s()
        step_began = time.perf_counter()
        batch = next(batches)
        waited_s += time.perf_counter() - step_began
        work(step, batch)
        if step >= warmup_steps:
            durations.append(time.perf_counter() - step_began)
            if dist.any_rank(time.perf_counter() - began >= seconds):
                break
    elapsed, used_s, images = time.perf_counter() - began, cpu_s() - cpu_began, len(durations) * cfg.run.batch_size
    specs = cfg.view_specs()
    durations.sort()
    return Rate(
        images_per_s=images / elapsed,
        steps=len(durations),
        step_s_median=durations[len(durations) // 2],
        step_s_p95=durations[int(0.95 * (len(durations) - 1))],
        cpu_ms_per_image=1000 * used_s / (images / dist.world()),
        data_wait=waited_s / elapsed,
        views_per_s=images * num_views(specs) / elapsed,
        megapixels_per_s=images * sum(s.count * s.size**2 for s in specs) / elapsed / 1e6,
    )


def cpu_s(children: bool = False) -> float:
    """User and system time of this process and all its threads so far; with `children`, of processes it waited for."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime + (ended.ru_utime + ended.ru_stime if children else 0.0)


def synthetic(cfg: Config, device: torch.device) -> SyntheticLoader:
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
