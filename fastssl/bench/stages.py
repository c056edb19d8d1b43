"""Where a loader's time goes: the same images through ever more of the chain, and what each addition costs.

The stages of a backend are not timed from inside: they overlap, share loops, and differ between backends. Instead a
ladder of loaders is built. The first only reads; the next shows each whole image in 16 x 16 px, so it decodes and does
little else; then come the crops at their real sizes, the colour operations, the blur, the strong draws; the last makes
of each batch the normalised floats that a step takes. All rungs see the same images and the same random numbers in a
round, and whole batches from first byte to last pixel, so CPU time is counted to the end. A stage costs the difference
of two rungs.

Two consequences: a backend that decodes no further than its crops reach saves that in the stage "crop", and a stage
cheaper than the noise of the machine cannot be resolved; it is given as a bound, not as a number.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fastssl import dist
from fastssl.bench.rates import cpu_s
from fastssl.bench.record import Figure
from fastssl.settings import Config
from fastssl.training import to_device, view_output
from pipelines.augment import AugmentSpec
from pipelines.backends import chosen
from pipelines.loader import available_cores
from pipelines.order import order, rows_for_step, windowed_order
from pipelines.reader import Reader, whole
from pipelines.renderer import Renderer, Step
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest

# What each stage adds to the chain, as fields of AugmentSpec; what comes before them is reading, decoding, cropping.
_ALWAYS = ("flip_p", "mean", "std")
_PHOTOGRAPHS = {
    "colour": ("jitter_p", "brightness", "contrast", "saturation", "hue", "grayscale_p", "grayscale_first"),
    "blur": ("blur_p", "blur_sigma", "solarize_p", "solarize_threshold"),
    "strong": ("strong_draws",),
}
_STAMPS = {"stretch": ("stretch", "floor")}
WRITE_OUT = "write-out"
_STORAGE_SHARE = 0.8  # of the loader's wall time: when reading alone takes that much, storage is the limit


@dataclass(frozen=True)
class Stage:
    """CPU and wall time per image that a stage adds, once a round; may be below 0 where noise is larger than it."""

    name: str
    cpu_ms: Figure
    wall_ms: Figure

    @property
    def resolved(self) -> bool:
        """Whether the stage showed in every round."""
        return self.cpu_ms.range[0] > 0

    @property
    def text(self) -> str:
        """The median, or the bound where it is not resolved, in CPU-ms per image."""
        return f"{self.cpu_ms.median:.2f}" if self.resolved else f"less than {self.bound_ms:.2f}"

    @property
    def bound_ms(self) -> float:
        """The most it cost in any round, in CPU-ms per image."""
        return max(0.0, self.cpu_ms.range[1])


def specs_by_stage(specs: Sequence[ViewSpec], bands: int) -> dict[str, list[ViewSpec]]:
    """Stage -> the views of its rung, from decode to the whole chain; stages that change nothing are left out."""
    adds = _STAMPS if bands else _PHOTOGRAPHS
    rungs = {"decode": [_tiny_view(specs[0], bands)], "crop": _with_augment(specs, _ALWAYS)}
    fields: tuple[str, ...] = _ALWAYS
    last = rungs["crop"]
    for stage, more in adds.items():
        fields = (*fields, *more)
        if (views := _with_augment(specs, fields)) != last:
            rungs[stage] = last = views
    return rungs


def measure_stages(cfg: Config, device: torch.device, seconds: float, rounds: int) -> dict[str, Figure]:
    """Figures "rungs/STAGE/cpu_ms_per_image" and ".../wall_ms_per_image": each rung of the ladder, once a round.

    Takes about `seconds`, at least one batch a rung and round. Raises as a Loader does.
    """
    manifest = cfg.data.manifest()
    ladder = _Ladder(cfg, manifest, device)
    try:
        once_s = sum(wall_ms for _, wall_ms in ladder.run(1).values()) / 1000 * ladder.share  # also the warm-up
        num_batches = max(1, round(seconds / rounds / once_s))
        measured = [ladder.run(num_batches) for _ in range(rounds)]
    finally:
        ladder.close()
    return {
        f"rungs/{stage}/{clock}_ms_per_image": Figure("ms/image", tuple(costs[stage][i] for costs in measured))
        for stage in measured[0]
        for i, clock in enumerate(("cpu", "wall"))
    }


def stages(figures: Mapping[str, Figure]) -> list[Stage]:
    """What each rung costs more than the one before it, in the order of the ladder."""
    names = list(dict.fromkeys(name.split("/")[1] for name in figures if name.startswith("rungs/")))
    found, before = [], ""
    for name in names:
        cpu, wall = (_added(figures, before, name, clock) for clock in ("cpu", "wall"))
        found.append(Stage(name, cpu, wall))
        before = name
    return found


def limit(figures: Mapping[str, Figure], threads: int) -> str:
    """One sentence: what keeps the loader from being faster, and what the rest would allow."""
    ladder = stages(figures)
    wall_ms = figures[f"rungs/{ladder[-1].name}/wall_ms_per_image"].median
    read_ms = figures["rungs/read/wall_ms_per_image"].median
    if read_ms > _STORAGE_SHARE * wall_ms:
        return (
            f"limit: storage, reading alone takes {read_ms:.2f} of {wall_ms:.2f} ms of wall time per image; put the"
            " shards on faster storage, or read ahead more with loader.prefetch"
        )
    *own, write_out = ladder
    loader_ms = figures[f"rungs/{own[-1].name}/cpu_ms_per_image"].median
    stage = max((stage for stage in own if stage.resolved), key=lambda stage: stage.cpu_ms.median)
    alone = threads * 1000 / stage.cpu_ms.median
    return (
        f"limit: {stage.name}, {stage.cpu_ms.median / loader_ms:.0%} of the loader's {loader_ms:.2f} CPU-ms per image;"
        f" {threads} thread(s) that did nothing else would make {alone:.0f} images/s. The floats that the step takes"
        f" cost {write_out.text} more"
    )


class _Ladder:
    """All rungs, open at once; a rung is idle while another runs, because each makes whole batches to their end."""

    def __init__(self, cfg: Config, manifest: Manifest, device: torch.device) -> None:
        self._cfg, self._manifest, self._device = cfg, manifest, device
        self.share = cfg.run.batch_size // dist.world()
        self._next_step = 0
        self._reader = Reader(manifest)
        self._renderers: list[Renderer] = []
        self._rungs: dict[str, Callable[[list[Step]], None]] = {"read": self._read}
        specs = cfg.view_specs()
        for stage, views in specs_by_stage(specs, manifest.bands).items():
            self._rungs[stage] = self._rendering(views, "uint8", lambda batch: None)
        self._rungs[WRITE_OUT] = self._rendering(
            specs, view_output(cfg, device), lambda batch: to_device(batch, cfg, device)
        )

    def run(self, num_batches: int) -> dict[str, tuple[float, float]]:
        """The next batches through every rung: stage -> CPU-ms and wall-ms per image of this rank."""
        plan = list(self._plan(self._next_step, num_batches))
        self._next_step += num_batches
        costs = {}
        for stage, work in self._rungs.items():
            wall_began, cpu_began = time.perf_counter(), cpu_s()
            work(plan)
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            wall_s, used_s = time.perf_counter() - wall_began, cpu_s() - cpu_began
            costs[stage] = (1000 * used_s / (num_batches * self.share), 1000 * wall_s / (num_batches * self.share))
        return costs

    def close(self) -> None:
        self._reader.close()
        for renderer in self._renderers:
            renderer.close()

    def _read(self, plan: list[Step]) -> None:
        ahead: deque = deque()
        for _, _, rows in plan:
            ahead.append(self._reader.request(rows))
            if len(ahead) > self._cfg.loader.batches_ahead:
                whole(image for part in ahead.popleft() for image in part.result())
        for parts in ahead:
            whole(image for part in parts for image in part.result())

    def _rendering(
        self, specs: Sequence[ViewSpec], output: str, use: Callable[..., object]
    ) -> Callable[[list[Step]], None]:
        cfg = self._cfg
        renderer = Renderer(
            self._manifest,
            specs,
            batch_size=self.share,
            seed=cfg.run.seed,
            backend=chosen(cfg.loader.backend, str(self._device), self._manifest.bands),
            device=str(self._device),
            threads=cfg.loader.threads or available_cores(),
            depth=cfg.loader.batches_ahead,
            output=output,
        )
        self._renderers.append(renderer)

        def make(plan: list[Step]) -> None:
            for batch in renderer.batches(plan):
                use(batch)

        return make

    def _plan(self, first: int, num_batches: int) -> Iterator[Step]:
        manifest, cfg = self._manifest, self._cfg
        steps_per_epoch = manifest.num_samples // cfg.run.batch_size
        for step in range(first, first + num_batches):
            epoch, place = divmod(step, steps_per_epoch)
            if cfg.loader.order == "window":
                permutation = windowed_order([s.num_samples for s in manifest.shards], cfg.run.seed, epoch)
            else:
                permutation = order(manifest.num_samples, cfg.run.seed, epoch)
            yield step, epoch, rows_for_step(permutation, place, cfg.run.batch_size, dist.rank(), dist.world())


def _tiny_view(spec: ViewSpec, bands: int) -> ViewSpec:
    """The whole image in one small view, which needs a whole decode and little else."""
    plain = AugmentSpec(flip_p=0.0, mean=spec.augment.mean, std=spec.augment.std)
    if bands:
        return ViewSpec(role="tiny", size=1, crop="turned", turn_deg=0.0, augment=plain)
    # No window of all the area has a random aspect, so that the crop falls back to the image as it is.
    return ViewSpec(role="tiny", size=16, scale=(1.0, 1.0), ratio=(0.01, 100.0), augment=plain)


def _with_augment(specs: Sequence[ViewSpec], fields: Sequence[str]) -> list[ViewSpec]:
    """The views with only these fields of their chains."""
    return [
        replace(spec, augment=AugmentSpec(**{name: getattr(spec.augment, name) for name in fields})) for spec in specs
    ]


def _added(figures: Mapping[str, Figure], before: str, name: str, clock: str) -> Figure:
    now = figures[f"rungs/{name}/{clock}_ms_per_image"]
    if not before:
        return now
    then = figures[f"rungs/{before}/{clock}_ms_per_image"]
    return Figure(now.unit, tuple(b - a for a, b in zip(then.rounds, now.rounds, strict=True)))
