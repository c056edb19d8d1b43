"""What a step works on, and the step: views to the device, the hooks of the method around the optimiser."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from fastssl import dist
from fastssl.evaluate.online import OnlineProbe
from fastssl.methods import Method, Output, RunFacts, build_method
from fastssl.nn.encoder import build_encoder
from fastssl.optim import build_optimizer, set_lr
from fastssl.precision import autocast
from fastssl.rejection import FlooredGradScaler, Rejection
from fastssl.schedule import Clock
from fastssl.settings import Config
from pipelines.loader import Batch, normalize
from pipelines.views import role_counts


@dataclasses.dataclass
class Training:
    """What a step works on: the method and everything that moves its weights."""

    cfg: Config
    device: torch.device
    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    model: torch.nn.Module  # the method, wrapped where ranks average gradients
    probe: OnlineProbe | None = None  # learns labels beside the method, which does not feel it

    @classmethod
    def build(cls, cfg: Config, device: torch.device, clock: Clock) -> Training:
        """From settings alone, the same weights on every rank. Raises ValueError."""
        torch.manual_seed(cfg.run.seed)
        facts = RunFacts(role_counts(cfg.view_specs()), cfg.run.seed, clock)
        method = build_method(cfg.method, build_encoder(**dataclasses.asdict(cfg.encoder)), facts)
        method.to(device).to(memory_format=memory_format(cfg))
        method.train()
        compile_encoders_(method, cfg.run.compile)
        optimizer = build_optimizer(method, cfg.optim, device)
        scaler = FlooredGradScaler(device.type, enabled=cfg.run.precision == "fp16")
        return cls(cfg, device, method, optimizer, scaler, dist.wrap_method(method))

    @functools.cached_property
    def rejection(self) -> Rejection:
        """Made by the first step, when a resume has put all that moves in its place."""
        return Rejection(self.method, self.optimizer, self.scaler, self.cfg.run.max_rejected)

    def step(self, views: dict[str, list[Tensor]], step: int, lr: float) -> Output:
        """One optimiser step on normalised float views; nothing in it waits for the device.

        If a loss or a gradient of any rank is not finite, nothing but the scaler is afterwards what it was not before.
        """
        set_lr(self.optimizer, lr)
        self.rejection.keep()
        self.method.before_step(step)
        with autocast(self.cfg.run.precision, self.device):
            output: Output = self.model(views, step)
        self.rejection.look(output.loss)
        self.scaler.scale(output.loss).backward()
        self.method.after_backward(step)
        self.rejection.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(output)
        self.rejection.put_back()
        return output


def view_output(cfg: Config, device: torch.device) -> str:
    """On a GPU the backend normalises there; on a CPU raw bytes are the smallest thing to hand over."""
    if device.type == "cpu" or cfg.loader.backend in ("native", "exact"):
        return "uint8"
    return "float16" if cfg.run.precision == "fp16" else "float32"


def to_device(batch: Batch, cfg: Config, device: torch.device) -> dict[str, list[Tensor]]:
    """The batch's views as normalised floats on `device`, in the memory format of the run."""

    def prepare(view: Tensor) -> Tensor:
        view = view.to(device, non_blocking=True)
        if view.dtype == torch.uint8:
            view = normalize(view, cfg.data.mean, cfg.data.std, torch.float32)
        return view.contiguous(memory_format=memory_format(cfg))

    return {role: [prepare(view) for view in views] for role, views in batch.views.items()}


def memory_format(cfg: Config) -> torch.memory_format:
    return torch.channels_last if cfg.run.channels_last else torch.contiguous_format


def compile_encoders_(method: Method, mode: str) -> None:
    """torch.compile in place. Modules stay what they are, so that neither names in a checkpoint nor hooks change.

    Each size of view and each mode (training, evaluating) has a graph of its own, made when it is first met.
    """
    if mode != "off":
        for encoder in method.encoders():
            encoder.forward = torch.compile(encoder.forward, mode=mode, dynamic=False)
