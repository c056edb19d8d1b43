"""Rank, world and the collectives methods need. On one process every function is the identity, and no group exists."""

from __future__ import annotations

import datetime
import os
from typing import TypeVar

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


def setup(device: str) -> torch.device:
    """Join the group that torchrun announced, if any, and return this rank's device.

    device  auto, cpu or cuda
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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not td.is_initialized():
        timeout = datetime.timedelta(seconds=INIT_TIMEOUT_S)
        store, r, w = next(td.rendezvous("env://", timeout=timeout))
        store.set_timeout(timeout)
        prefixed = td.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # gloo for CPU tensors in either case: what ranks agree on each step must not wait for the GPU
        backends = "cpu:gloo,cuda:nccl" if use_cuda else "cpu:gloo"
        td.init_process_group(backends, store=prefixed, rank=r, world_size=w, timeout=timeout)
    return torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")


def teardown() -> None:
    if td.is_initialized():
        td.destroy_process_group()


def barrier() -> None:
    if td.is_initialized():
        td.barrier()


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """(B, ...) of every rank -> (W * B, ...) in rank order, without gradient."""
    if world() == 1:
        return x
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


def any_rank(flag: bool) -> bool:
    """Whether any rank says so; all ranks get the same answer. A collective: every rank must call it."""
    if world() == 1:
        return flag
    said = torch.tensor([int(flag)])
    td.all_reduce(said, td.ReduceOp.MAX)
    return bool(said.item())


def main_says(value: object) -> object:
    """Rank 0's JSON-like value, on every rank."""
    if world() == 1:
        return value
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def permutation(size: int, seed: int, step: int) -> Tensor:
    """The shuffle of step `step`: a pure function, so that ranks agree without talking and a resume repeats it."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + step) % 2**63)
    return torch.randperm(size, generator=generator)


def _all_reduce(x: Tensor, operation: td.ReduceOp.RedOpType) -> Tensor:
    if world() == 1:
        return x
    x = x.clone()
    td.all_reduce(x, operation)
    return x


def wrap(method: nn.Module) -> nn.Module:
    """The module whose forward averages gradients over ranks; `method` itself on one process.

    Buffers follow rank 0 at each forward, as in the published code, except those that `method.own_buffers` names (a
    queue: large, and either equal on all ranks by construction or meant to differ). Not DDP's static_graph: it looks
    for tensors in tuples and dicts only, finds none in an `Output`, and then leaves gradients local without a word
    (torch 2.14).
    """
    if world() == 1:
        return method
    ddp = nn.parallel.DistributedDataParallel
    ddp._set_params_and_buffers_to_ignore_for_model(method, list(getattr(method, "own_buffers", ())))
    device_ids = [torch.cuda.current_device()] if next(method.parameters()).is_cuda else None
    return ddp(method, device_ids=device_ids, gradient_as_bucket_view=True)
