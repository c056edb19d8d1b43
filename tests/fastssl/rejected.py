"""What the tests of rejected steps share: small trainings with an online probe, spoilt views, all of their state."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl import config, dist
from fastssl.evaluate.online import OnlineProbe
from fastssl.methods import Output
from fastssl.schedule import Clock
from fastssl.settings import Config
from fastssl.training import Training, to_device
from pipelines.loader import Batch
from pipelines.synthetic import SyntheticLoader
from tests.fastssl.test_host_waits import BATCH, FORMS, MOMENTUM, SMALL

Spoil = Callable[[dict[str, list[Tensor]]], None]
FIVE_SIZES = [f"views.{role}_{px}.size={px // 6}" for role in ("query", "strong") for px in (224, 192, 160, 128, 96)]
MORE_FORMS = {
    "clsa_multi": ["method=clsa_multi", *MOMENTUM, "views.key.size=32", *FIVE_SIZES],
    "swav_learning": [*FORMS["swav"], "method.freeze_prototypes=0steps"],  # its prototypes have gradients at once
}


@dataclass
class Lab:
    """A training from a fixed seed, its probe, and the batches of all steps."""

    training: Training
    probe: OnlineProbe
    batches: list[Batch]

    @classmethod
    def build(cls, form: str, *more: str, steps: int = 8) -> Lab:
        cfg, batches = _settings_and_batches(form, more, steps)
        training = Training.build(cfg, torch.device("cpu"), Clock(100, BATCH))
        return cls(training, OnlineProbe(training.method, 10, cfg.online, "cpu"), batches)

    def steps(self, numbers: Iterable[int], spoil: Spoil = lambda views: None) -> Output:
        """These steps as the loop makes them; `spoil` changes the views of each first."""
        for number in numbers:
            batch = self.batches[number]
            views = {role: [view.clone() for view in views] for role, views in batch.views.items()}
            spoil(views)
            views = to_device(Batch(views, batch.labels, batch.ids, number), self.training.cfg, self.training.device)
            output = self.training.step(views, number, 0.05)
            output.logs |= self.probe.learn(batch.labels, self.training.rejection.rejected)
            self.training.rejection.remember(batch.ids)
        return output

    def state(self) -> dict[str, Tensor]:
        """A copy of every tensor of the method, the optimiser, the probe and its Adam, by name."""
        method, named = self.training.method, {}
        named |= {f"method.{name}": t for name, t in [*method.named_parameters(), *method.named_buffers()]}
        for name, optimizer in (("optimizer", self.training.optimizer), ("adam", self.probe.optimizer)):
            for i, state in enumerate(optimizer.state.values()):
                named |= {f"{name}.{i}.{key}": t for key, t in state.items()}
        named |= {f"probe.{name}": t for name, t in self.probe.layer.named_parameters()}
        return {name: t.detach().clone() for name, t in named.items()}


@functools.cache
def _settings_and_batches(form: str, more: tuple[str, ...], steps: int) -> tuple[Config, list[Batch]]:
    cfg = config.load([*SMALL, *{**FORMS, **MORE_FORMS}[form], *more])
    loader = SyntheticLoader(
        cfg.view_specs(), batch_size=BATCH, rank=dist.rank(), world=dist.world(), channels=cfg.encoder.channels,
        output="float32",
    )  # fmt: skip
    return cfg, [batch for _, batch in zip(range(steps), loader.batches())]


def pixel(value: float, role: str | None = None, image: int = 1) -> Spoil:
    """One channel of one pixel of one view is `value`: the first view of `role`, or of the first role."""

    def spoil(views: dict[str, list[Tensor]]) -> None:
        view = views[role or next(iter(views))][0]
        view[image, 1, view.shape[-1] // 2, view.shape[-1] // 2] = value

    return spoil


def different(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bits."""
    assert a.keys() == b.keys()
    return [name for name in a if as_bytes(a[name]) != as_bytes(b[name])]


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def finite(state: dict[str, Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in state.values())
