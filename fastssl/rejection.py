"""A step whose numbers went bad is taken back, by all ranks alike, and no host waits for a device to know it.

A rank whose loss, or whose batch norms' running statistics, are not finite makes the gradient of one parameter NaN
before ranks average gradients: so all hear of it, without a collective of its own. After the average, a gradient that
is not finite on one rank is so on all, and the step is rejected: whatever it moved is as it was before. Running
statistics are looked at because they can be infinite where loss and gradients are not: activations near 1e20 have a
variance that overflows, and come out of the batch norm as 0.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import dist
from fastssl.methods.base import Method
from shard_tools import exit_codes

SMALL = 2**16  # elements of a tensor that is kept together with others: one kernel for hundreds of them
AHEAD = 64  # steps; the host does not run further ahead of a device, whose queue of kernels is finite


class NotFinite(ValueError):
    """A tensor with a NaN or an infinity, where none may be."""

    exit_code = exit_codes.NOT_FINITE


class Rejection:
    """The optimiser step of a training, taken if the gradients of all ranks are finite, and nothing else moved if not.

    keep, look, update, put_back are called in this order, once a step.

    patience    rejected steps in a row that end a run

    rejected    whether the last step was, equal on all ranks; a scalar on the device
    own         whether this rank's own forward was why
    """

    def __init__(
        self, method: Method, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, patience: int
    ) -> None:
        self._optimizer, self._scaler, self._patience = optimizer, scaler, patience
        self._herald = next(p for p in method.backbone().parameters() if p.requires_grad)
        self._statistics = [
            statistics
            for module in method.modules()
            if isinstance(module, _BatchNorm)
            for statistics in (module.running_mean, module.running_var)
            if statistics is not None
        ]
        self._skips = getattr(optimizer, "_step_supports_amp_scaling", False)  # torch's fused kernels
        self._kept = Kept(_moved(method, optimizer, self._skips))
        device = self._herald.device
        self._one = torch.ones((), device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._most = torch.zeros((), dtype=torch.int64, device=device)
        self._most_in_a_row = LateNumber(device)
        self._batches: collections.deque[tuple[Tensor, Tensor]] = collections.deque(maxlen=patience + AHEAD)
        self.rejected = self.own = torch.zeros((), dtype=torch.bool, device=device)

    def keep(self) -> None:
        """Before anything moves."""
        self._kept.keep()

    @torch.no_grad()
    def look(self, loss: Tensor) -> None:
        """Between forward and backward: what this rank found, for the others to hear in the gradient."""
        numbers = torch.cat([loss.detach().reshape(1).float(), *(s.float() for s in self._statistics)])
        finite = numbers.isfinite().all()
        self.own = ~finite
        factor = torch.where(finite, 1.0, torch.nan)
        self._hook = self._herald.register_hook(lambda gradient: gradient * factor)

    @torch.no_grad()
    def update(self) -> None:
        """After backward: the optimiser's step, unless a gradient is not finite."""
        self._hook.remove()
        found = self._found()
        self.rejected = found > 0
        if self._skips:
            self._optimizer.found_inf = found  # type: ignore[attr-defined]
        self._optimizer.step()
        if self._skips:
            del self._optimizer.found_inf  # type: ignore[attr-defined]
        self._scaler.update()

    @torch.no_grad()
    def put_back(self) -> None:
        """After everything moved: all of it as `keep` found it, if the step was rejected."""
        self._kept.put_back(self.rejected)
        self._in_a_row = (self._in_a_row + 1) * self.rejected
        self._most = torch.maximum(self._most, self._in_a_row)

    def remember(self, ids: Tensor) -> None:
        """Of the step's samples, for `suspects`."""
        self._batches.append((ids, self.rejected & self.own))

    def too_many(self) -> bool:
        """Whether `patience` steps in a row were rejected; known without waiting, on a GPU some steps late."""
        return self._most_in_a_row.lately(self._most) >= self._patience

    def suspects(self) -> list[int]:
        """Ids of the samples with which this rank spoiled the latest steps. The host waits."""
        return list(dict.fromkeys(i for ids, spoiled in self._batches if spoiled for i in ids.tolist()))

    def _found(self) -> Tensor:
        """1.0 if a gradient is not finite; they are unscaled now."""
        if self._scaler.is_enabled():
            self._scaler.unscale_(self._optimizer)
            (found,) = self._scaler._found_inf_per_device(self._optimizer).values()
            return found
        found = self._one.new_zeros(())
        gradients = [p.grad for g in self._optimizer.param_groups for p in g["params"] if p.grad is not None]
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, self._one)
        return found


class Kept:
    """Tensors and room for their copies, taken each step and put back on the device's own decision.

    The room is made once, and the tensors must stay the same ones: changed in place.
    """

    @torch.no_grad()
    def __init__(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        self._large = [(t, torch.empty_like(t)) for t in tensors if t.numel() > SMALL]
        by_kind = collections.defaultdict(list)
        for t in tensors:
            if t.numel() <= SMALL:
                by_kind[t.dtype, t.device].append(t)
        self._small = [(together, torch.empty_like(_flat(together))) for together in by_kind.values()]

    @torch.no_grad()
    def keep(self) -> None:
        for tensor, copy in self._large:
            copy.copy_(tensor)
        for together, copy in self._small:
            copy.copy_(_flat(together))

    @torch.no_grad()
    def put_back(self, when: Tensor) -> None:
        """when     a boolean on the device; nothing changes where it is false"""
        for tensor, copy in self._large:
            torch.where(when, copy, tensor, out=tensor)
        for together, copy in self._small:
            parts = torch.where(when, copy, _flat(together)).split([t.numel() for t in together])
            torch._foreach_copy_(together, [part.view(t.shape) for part, t in zip(parts, together)])


class LateNumber:
    """A whole number of a device's, on the host as soon as that costs no waiting; of a CPU's at once."""

    def __init__(self, device: torch.device) -> None:
        self._here = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._value = self._here.numpy()  # the same memory
        self._known = 0
        self._arrived = torch.cuda.Event() if device.type == "cuda" else None

    def lately(self, number: Tensor) -> int:
        """What `number` was when this was last called and the device had come so far."""
        if self._arrived is None:
            self._here.copy_(number)
            return int(self._value)
        if self._arrived.query():  # true also before the first record
            self._known = int(self._value)
            self._here.copy_(number, non_blocking=True)
            self._arrived.record()
        return self._known


class FlooredGradScaler(torch.amp.GradScaler):
    """A GradScaler whose scale never falls below 1.

    torch's halves at each step that overflows, down to 0, and then the next finite step divides 0 by 0. A run of
    fp16 rejects up to 16 steps, all at its start, until the scale has come down from 2^16.
    """

    def update(self, new_scale: float | Tensor | None = None) -> None:
        super().update(new_scale)
        if self.is_enabled() and self._scale is not None:
            self._scale.clamp_(min=1.0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "scale": max(state_dict["scale"], 1.0)} if state_dict else state_dict)


def refuse_not_finite(state: object, what: str) -> None:
    """Raise NotFinite on all ranks if tensors or numbers in nested dicts and lists are not finite. A collective.

    what    is refused, for the message
    """
    name = not_finite(state)
    if dist.any_rank(name is not None):
        raise NotFinite(
            f"{what}, because {name or 'a tensor of another rank'} holds a NaN or an infinity; what was saved before is"
            " kept; begin anew in another run.dir with a lower optim.lr, with optim.warmup, or with run.precision=bf16"
            " or fp32"
        )


def not_finite(state: object, name: str = "") -> str | None:
    """The name of a tensor or number in nested dicts and lists that is not finite, or None. The host waits."""
    found = dict(_numbers(state, name))
    if not found:
        return None
    names, values = zip(*found.items())
    finite = torch.stack([torch.as_tensor(v).isfinite().all().cpu() for v in values])
    return None if finite.all() else names[int(finite.int().argmin())]


def _numbers(state: object, name: str) -> Iterable[tuple[str, Tensor | float]]:
    if isinstance(state, Mapping):
        for key, value in state.items():
            yield from _numbers(value, f"{name}.{key}" if name else str(key))
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            yield from _numbers(value, f"{name}[{i}]")
    elif isinstance(state, float) or (isinstance(state, Tensor) and state.is_floating_point()):
        yield name, state


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _moved(method: Method, optimizer: torch.optim.Optimizer, skips: bool) -> list[Tensor]:
    """What a step moves but for what the optimiser leaves alone if it `skips` steps by itself."""
    mine = method.moved_before_step()
    moved = [*method.buffers(), *(p for p in method.parameters() if not p.requires_grad), *mine]
    if not skips:
        known = {id(t) for t in moved}
        moved += [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
        for p, state in optimizer.state.items():  # a count of steps may lie on the host, but only of a CPU's optimiser
            moved += [t for t in state.values() if isinstance(t, Tensor) and t.device == p.device]
    return moved
