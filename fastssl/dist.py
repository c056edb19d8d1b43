"""Rank, world and the collectives methods need. On one process every function is the identity, and no group exists."""

from __future__ import annotations

import datetime
import inspect
import os
from collections.abc import Collection
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

INIT_TIMEOUT_S = 300


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def local_rank() -> int:
    """This rank's number on its own host."""
    return int(os.environ.get("LOCAL_RANK", "0")) if td.is_initialized() else 0


def world() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def setup(device: str, timeout_s: float = INIT_TIMEOUT_S) -> torch.device:
    """Join the group that torchrun announced, if any, and return this rank's device.

    device      auto, cpu or cuda
    timeout_s   after which a collective gives up; meeting for the first time always gets INIT_TIMEOUT_S
    The store is prefixed with torchrun's restart count: with a plain store a restarted group meets the keys of the dead
    one and hangs (measured: 1 of 12 restarts recovered without the prefix, 12 of 12 with it).
    Raises ValueError with the remedy if CUDA is asked for and not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("run.device is 'cuda', but torch finds no GPU; install a driver, or say run.device=cpu")
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if use_cuda:
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU of its own: torch finds {torch.cuda.device_count()}; "
                f"start with --nproc-per-node {torch.cuda.device_count()}"
            )
        torch.cuda.set_device(local_rank)
    if announced()[1] > 1 and not td.is_initialized():
        timeout = datetime.timedelta(seconds=INIT_TIMEOUT_S)
        store, r, w = next(td.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        # gloo for CPU tensors in either case: what ranks agree on each step must not wait for the GPU
        backends = "cpu:gloo,cuda:nccl" if use_cuda else "cpu:gloo"
        longest = datetime.timedelta(seconds=max(timeout_s, INIT_TIMEOUT_S))
        td.init_process_group(backends, store=_of_this_attempt(store), rank=r, world_size=w, timeout=longest)
    return torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")


def teardown() -> None:
    if td.is_initialized():
        td.destroy_process_group()


def announced() -> tuple[int, int]:
    """(rank, world) as the launcher says, also before `setup` and after a group is lost."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def hosts_store() -> bool:
    """Whether the store in which ranks find each other lives in this process, and ends with it.

    torchrun's agent has it; under other launchers rank 0.
    """
    return announced()[0] == 0 and not _agent_has_store()


def connect(timeout_s: float) -> td.Store | None:
    """A connection of its own to the store of this start of the ranks, for any thread; None if nobody answers.

    Before `setup` only torchrun's agent has one.
    """
    if not (td.is_initialized() or _agent_has_store()):
        return None
    try:
        store = td.TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except (KeyError, ValueError, RuntimeError):
        return None
    return _of_this_attempt(store)


def _agent_has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _of_this_attempt(store: td.Store) -> td.Store:
    return td.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def barrier() -> None:
    if td.is_initialized():
        td.barrier()


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """(B, ...) of every rank -> (W * B, ...) in rank order, without gradient."""
    if world() == 1:
        return x
    if _is_channels_last(x):
        return all_gather(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    x = x.contiguous()
    out = x.new_empty((world() * x.shape[0], *x.shape[1:]))
    gather = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor  # the older name, deprecated in 2.14
    gather(out, x)
    return out


@torch.no_grad()
def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean over ranks, a new tensor (x itself on one process)."""
    return x if world() == 1 else _all_reduce(x, td.ReduceOp.SUM) / world()


@torch.no_grad()
def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum over ranks, a new tensor (x itself on one process)."""
    return _all_reduce(x, td.ReduceOp.SUM)


@torch.no_grad()
def all_reduce_max(x: Tensor) -> Tensor:
    """The largest over ranks, a new tensor (x itself on one process)."""
    return _all_reduce(x, td.ReduceOp.MAX)


@torch.no_grad()
def all_to_all(x: Tensor) -> Tensor:
    """(B, ...) -> (B, ...): the W equal parts of each rank's rows go to the W ranks, and arrive in the senders' order.

    B is a multiple of W. A rank sends and receives B rows, where `all_gather` brings it W * B.
    """
    if world() == 1:
        return x
    if _is_channels_last(x):
        return all_to_all(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    x = x.contiguous()
    out = torch.empty_like(x)
    td.all_to_all_single(out, x)
    return out


def any_rank(flag: bool) -> bool:
    """Whether any rank says so; all ranks get the same answer. A collective: every rank must call it."""
    if world() == 1:
        return flag
    said = torch.tensor([int(flag)])
    td.all_reduce(said, td.ReduceOp.MAX)
    return bool(said.item())


class LargestLately:
    """The largest of all ranks' small numbers, once a step: that of the call before, so that no rank waits for another.

    All ranks get the same answer at the same call. One process is answered at once.
    """

    def __init__(self) -> None:
        self._said: Tensor | None = None
        self._work: td.Work | None = None

    def __call__(self, value: int) -> int:
        """0 at the first call of several ranks. A collective: every rank must call it equally often."""
        if world() == 1:
            return value
        answer = self._answer() if self._work is not None else 0
        self._said = torch.tensor([int(value)])  # on the CPU, where gloo and not the GPU answers
        self._work = td.all_reduce(self._said, td.ReduceOp.MAX, async_op=True)
        return answer

    def close(self) -> None:
        """Wait for the others' last numbers, so that no rank leaves in the middle of theirs."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def _answer(self) -> int:
        assert self._said is not None
        assert self._work is not None
        self._work.wait()
        return int(self._said.item())


def main_says(value: object) -> object:
    """Rank 0's JSON-like value, on every rank."""
    if world() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def all_say(value: Any) -> list[Any]:
    """Every rank's JSON-like value, on every rank, in rank order."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    td.all_gather_object(values, value)
    return values


def own_rows(x: Tensor) -> Tensor:
    """(W * B, ...) in rank order -> the B rows of this rank."""
    return x.unflatten(0, (world(), -1))[rank()]


def permutation(size: int, seed: int, step: int) -> Tensor:
    """An order of `size` things, a pure function: ranks agree without talking. On the CPU."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)
    return torch.randperm(size, generator=generator)


def shuffled_places(size: int, seed: int, step: int, device: torch.device | str = "cpu", parts: int = 1) -> Tensor:
    """The shuffle of step `step`: places 0..size, shuffled inside each of `parts` equal parts. A pure function.

    Made on `device`, and the same on every device: a copy from the host would make the host wait for all that the
    device has still to do. Places are sorted by a hash of theirs, the finaliser of splitmix64 but for signed shifts.
    """
    places = torch.arange(size, device=device)
    x = places * _GOLDEN + _as_int64(seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> shift)) * _as_int64(factor)
    inside = (x ^ (x >> 31)).view(parts, -1).argsort(dim=1, stable=True)
    return (inside + places.view(parts, -1)[:, :1]).flatten()


def _as_int64(value: int) -> int:
    """`value` modulo 2^64, as the signed number with the same bits."""
    return (value + 2**63) % 2**64 - 2**63


_GOLDEN = _as_int64(0x9E3779B97F4A7C15)


def _is_channels_last(x: Tensor) -> bool:
    """Whether `x` is images whose memory is rows of (H, W, C): collectives move such as they are."""
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _all_reduce(x: Tensor, operation: td.ReduceOp.RedOpType) -> Tensor:
    if world() == 1:
        return x
    x = x.clone()
    td.all_reduce(x, operation)
    return x


def wrap(module: M) -> nn.Module:
    """The module whose forward averages gradients over ranks; `module` itself on one process.

    Buffers follow rank 0 at each forward.
    """
    if world() == 1:
        return module
    return nn.parallel.DistributedDataParallel(module, device_ids=_device_ids(module), gradient_as_bucket_view=True)


def wrap_method(method: nn.Module) -> nn.Module:
    """The same for a module whose forward gives an object with a `loss`, and which uses the same parameters each step.

    Buffers stay each rank's own. Nothing in a training step reads the running statistics of batch norm, rank 0's are
    what is saved, and `follow_main_` brings them to the others where they matter; broadcast at each forward, as DDP
    would, they are a collective a step whose only effect is on copies that nobody looks at.
    """
    return method if world() == 1 else _Averaged(method)


# Whether buffers follow rank 0 at each forward; torch 2.14 renamed the option, and warns of the older name.
_DDP_OPTIONS = inspect.signature(nn.parallel.DistributedDataParallel.__init__).parameters
_FOLLOW_EACH_STEP = "forward_sync_buffers" if "forward_sync_buffers" in _DDP_OPTIONS else "broadcast_buffers"


class _Averaged(nn.Module):
    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        options: dict[str, Any] = {_FOLLOW_EACH_STEP: False}
        self.ddp = nn.parallel.DistributedDataParallel(
            _LossFirst(method),
            device_ids=_device_ids(method),
            gradient_as_bucket_view=True,
            static_graph=True,
            **options,
        )

    def forward(self, *inputs: Any) -> Any:
        loss, output = self.ddp(*inputs)
        output.loss = loss
        return output


class _LossFirst(nn.Module):
    """What DDP can see through: with a static graph it looks for tensors in tuples and dicts only, and where it finds
    none it leaves gradients local without a word (torch 2.14)."""

    def __init__(self, method: nn.Module) -> None:
        super().__init__()
        self.method = method

    def forward(self, *inputs: Any) -> tuple[Tensor, Any]:
        output = self.method(*inputs)
        return output.loss, output


@torch.no_grad()
def follow_main_(module: nn.Module, own: Collection[str] = ()) -> None:
    """Buffers as rank 0 has them, but for those named in `own`. A collective."""
    if world() == 1:
        return
    for name, buffer in module.named_buffers():
        if name not in own:
            td.broadcast(buffer, src=0)


def _device_ids(module: nn.Module) -> list[int] | None:
    return [torch.cuda.current_device()] if next(module.parameters()).is_cuda else None
