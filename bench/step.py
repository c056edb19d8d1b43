"""The training step against its published form: seconds per step and loss, from the same weights on the same views.

    python -m bench.step moco_v2 --data SHARDS --batch 16 --rounds 10
    python -m bench.step swav --data SHARDS --batch 8 --rounds 10 --also fp32=run.precision=fp32

A round is one optimiser step of each form on the batch of that round, in an order that turns; the first round warms up
and counts for the loss only. Ours includes bringing the views from bytes to normalised floats, the published form gets
them as floats. Batch norm is `plain`, the statistics that the published form has on one process, unless `--also` says
otherwise. Writes a result (`fastssl.bench.record`) and a figure of both loss curves.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import ResNet, resnet18, resnet50

from bench.peers.published_moco_step import PublishedMocoStep
from bench.peers.published_swav_step import PublishedSwavStep
from fastssl import config
from fastssl.bench.record import Figure, Record
from fastssl.methods.moco import Moco
from fastssl.methods.swav import Swav
from fastssl.schedule import Clock
from fastssl.settings import Config
from fastssl.train import set_threads
from fastssl.training import Training, to_device
from pipelines.loader import Batch, Loader
from pipelines.synthetic import SyntheticLoader
from shard_tools.manifest import Manifest

CPU = torch.device("cpu")
NO_DATA = "none"
TRUNKS = {"resnet18": resnet18, "resnet50": resnet50}
OURS = ("run.precision=bf16", "method.batch_norm=plain")


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to make the step: `prepare` a batch off the clock, then `step` it, which gives the loss."""

    prepare: Callable[[Batch], Any]
    step: Callable[[Any, int], float]


def main(argv: Sequence[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(given)
    base = [
        f"method={arguments.method}", f"encoder={arguments.encoder}", f"run.batch_size={arguments.batch}",
        f"data.root={arguments.data}", "run.device=cpu",
    ]  # fmt: skip
    forms = {"ours": OURS, **{name: (*OURS, *more) for name, more in map(_form, arguments.also)}}
    configs = {name: config.load([*base, *overrides]) for name, overrides in forms.items()}
    cfg = configs["ours"]
    set_threads(cfg, CPU)
    lr = cfg.optim.lr * (arguments.batch / 256)
    batches = _batches(cfg, arguments.rounds + 1)
    contestants = {"published": published(cfg, lr), **{name: ours(c, lr) for name, c in configs.items()}}
    seconds, losses = interleaved(contestants, batches)
    rates = arithmetic_rates(arguments.rounds)
    bounds = arithmetic_bound(published(cfg, lr), batches[0], seconds["published"], rates["matmul/bfloat16"])
    figures = _figures(arguments.method, seconds, losses) | rates
    figures |= {f"{arguments.method}/arithmetic/{name}": figure for name, figure in bounds.items()}
    record = Record(
        what="one optimiser step in its published form and in ours, from the same weights on the same views",
        command=shlex.join(["python", "-m", "bench.step", *("SHARDS" if a == arguments.data else a for a in given)]),
        figures=figures,
        settings={
            "method": arguments.method,
            "encoder": arguments.encoder,
            "batch": arguments.batch,
            "views": "synthetic" if arguments.data == NO_DATA else "photographs",
            "threads": torch.get_num_threads(),
            "lr": lr,
            "forms": {name: list(overrides) for name, overrides in forms.items()},
        },
    )
    record.save(arguments.out)
    if arguments.figure:
        draw_losses(losses, f"{arguments.method}, {arguments.encoder}, batch {arguments.batch}", arguments.figure)
    for name, figure in figures.items():
        print(f"{name:<44}{figure.median:10.4f} {figure.unit:<8}{min(figure.rounds):10.4f}{max(figure.rounds):10.4f}")
    print(f"(median, smallest and largest of {arguments.rounds} rounds) written to {arguments.out}")
    return 0


def interleaved(
    forms: Mapping[str, Form], batches: Sequence[Batch]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each form in every round but the first, and its loss in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    losses: dict[str, list[float]] = {name: [] for name in forms}
    names = list(forms)
    for number, batch in enumerate(batches):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            views = forms[name].prepare(batch)
            began = time.perf_counter()
            losses[name].append(forms[name].step(views, number))
            if number:
                seconds[name].append(time.perf_counter() - began)
    return seconds, losses


def arithmetic_rates(rounds: int, side: int = 3072) -> dict[str, Figure]:
    """What the machine makes of a large matrix product: a step of convolutions cannot gain more than their ratio."""
    rates: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for _ in range(rounds):
        for dtype, values in rates.items():
            a = torch.ones(side, side, dtype=dtype)
            a @ a  # warms up
            began = time.perf_counter()
            a @ a
            values.append(2e-9 * side**3 / (time.perf_counter() - began))
    figures = {f"matmul/{str(d).removeprefix('torch.')}": Figure("GFLOP/s", tuple(v)) for d, v in rates.items()}
    ratios = tuple(half / full for full, half in zip(*rates.values()))
    return {**figures, "matmul/bfloat16_over_float32": Figure("x", ratios)}


def arithmetic_bound(form: Form, batch: Batch, seconds: Sequence[float], rate: Figure) -> dict[str, Figure]:
    """A step's convolutions and matrix products, and what they leave to gain if all else cost nothing.

    seconds     of the step as published; rate in GFLOP/s
    """
    views = form.prepare(batch)
    with FlopCounterMode(display=False) as counter:
        form.step(views, 0)
    gflop = counter.get_total_flops() / 1e9
    return {
        "gflop": Figure("GFLOP", (gflop,)),
        "step_s": Figure("s", tuple(gflop / each for each in rate.rounds)),
        "faster_than_published": Figure("x", tuple(slow * each / gflop for slow, each in zip(seconds, rate.rounds))),
    }


def ours(cfg: Config, lr: float) -> Form:
    training = Training.build(cfg, CPU, _clock(cfg))

    def step(batch: Batch, number: int) -> float:
        return training.step(to_device(batch, cfg, CPU), number, lr).loss.item()

    return Form(lambda batch: batch, step)


def published(cfg: Config, lr: float) -> Form:
    """The peer, with the weights and the queue that `ours` starts from."""
    method = Training.build(cfg, CPU, _clock(cfg)).method.to(memory_format=torch.contiguous_format)
    as_floats = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, channels_last=False))
    trunk: ResNet = TRUNKS[cfg.encoder.name]()
    trunk.fc = nn.Identity()  # type: ignore[assignment]
    trunk.load_state_dict(method.backbone().state_dict())
    if isinstance(method, Moco):
        trunk.fc = method.encoder_q.head  # type: ignore[assignment]
        moco = PublishedMocoStep(
            trunk, method.queue.T.contiguous(), method.momentum, method.config.temperature, lr, cfg.optim.weight_decay
        )
        return Form(
            lambda batch: to_device(batch, as_floats, CPU),
            lambda views, number: moco.step(views["query"][0], views["key"][0]),
        )
    assert isinstance(method, Swav)
    swav = PublishedSwavStep(trunk, method.projection_head, method.prototypes, lr, method.frozen_steps)
    return Form(
        lambda batch: to_device(batch, as_floats, CPU),
        lambda views, number: swav.step([*views["global"], *views["local"]]),
    )


def draw_losses(losses: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """The loss of every form by step, over the distance of each from the published one."""
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6.4, 3.6), dpi=90, layout="constrained")
    above, below = canvas.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for number, (name, values) in enumerate(losses.items()):
        style = {"color": f"C{number}", "linestyle": "--" if number else "-", "label": name}
        above.plot(values, **style)
        if name != "published":
            below.plot([a - b for a, b in zip(values, losses["published"])], **style)
    above.set(ylabel="loss", title=title)
    above.legend()
    below.set(ylabel="difference", xlabel="step")
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path)


def _figures(
    method: str, seconds: Mapping[str, Sequence[float]], losses: Mapping[str, Sequence[float]]
) -> dict[str, Figure]:
    figures = {f"{method}/{name}/step_s": Figure("s", tuple(values)) for name, values in seconds.items()}
    for name, values in seconds.items():
        if name != "published":
            ratios = tuple(slow / fast for slow, fast in zip(seconds["published"], values))
            figures[f"{method}/{name}/faster_than_published"] = Figure("x", ratios)
    figures |= {f"{method}/{name}/loss": Figure("nats", tuple(values)) for name, values in losses.items()}
    for name, values in losses.items():
        if name != "published":
            largest = max(abs(a - b) for a, b in zip(values, losses["published"]))
            figures[f"{method}/{name}/largest_loss_difference"] = Figure("nats", (largest,))
    return figures


def _batches(cfg: Config, count: int) -> list[Batch]:
    """The first batches of a run: of photographs if `data.root` names shards, or of random pixels."""
    if cfg.data.root == NO_DATA:
        synthetic = SyntheticLoader(cfg.view_specs(), batch_size=cfg.run.batch_size, seed=cfg.run.seed)
        return list(itertools.islice(synthetic.batches(), count))
    manifest = Manifest.load(cfg.data.root, cfg.data.split)
    with Loader(
        manifest, cfg.view_specs(), batch_size=cfg.run.batch_size, seed=cfg.run.seed, backend=cfg.loader.backend
    ) as loader:
        return list(itertools.islice(loader.batches(), count))


def _clock(cfg: Config) -> Clock:
    """Of ImageNet at batch 256, so that SwAV's prototypes stay frozen throughout, as they would."""
    return Clock(5004, cfg.run.batch_size)


def _form(text: str) -> tuple[str, list[str]]:
    name, _, overrides = text.partition("=")
    return name, overrides.split()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("method", choices=("moco_v2", "swav"))
    parser.add_argument("--data", default=NO_DATA, help="packed shards; without them views are random pixels")
    parser.add_argument("--encoder", default="resnet50", choices=list(TRUNKS))
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="NAME=OVERRIDES",
        help='another form of ours, such as "fp32=run.precision=fp32 run.channels_last=false"',
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results/step.json"))
    parser.add_argument("--figure", type=Path, help="PNG of the loss curves")
    return parser


if __name__ == "__main__":
    sys.exit(main())
