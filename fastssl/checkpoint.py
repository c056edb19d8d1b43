"""Checkpoints: a folder a step, plain tensors and JSON, hashed, and complete or not there at all.

    <run>/checkpoints/step-00000500/model.pt       the method's state_dict
                                    training.pt    optimiser and GradScaler
                                    rank-0.pt      what differs by rank: random states, the method's rank_state()
                                    meta.json      step, config, fingerprint of the data, versions
                                    SHA256SUMS     of all the others
    <run>/checkpoints/LAST                         name of the newest

A folder is written under another name, synced and renamed, and LAST moves when all ranks have written. Reading checks
every hash before a tensor is used and walks back to the newest folder that is whole. Nothing here unpickles objects.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.config import convert
from fastssl.methods import Method, RunFacts, build_method
from fastssl.nn.encoder import build_encoder
from fastssl.schedule import Clock
from fastssl.settings import Config
from pipelines.views import role_counts

FORMAT = 1
SUMS = "SHA256SUMS"


class CheckpointError(ValueError):
    """A checkpoint that is not there, not whole, or of other data; the message says where and what to do."""


def save(
    run_dir: Path,
    step: int,
    model: nn.Module,
    training: dict[str, Any],
    meta: dict[str, Any],
    keep: int,
    rank_state: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint of `step` with all ranks together and drop all but the `keep` newest. Returns its folder.

    A collective: every rank must call it. Raises OSError (disk full and the like) with the older checkpoints untouched.
    """
    root = run_dir / "checkpoints"
    final, beside = root / f"step-{step:08d}", root / f".writing-step-{step:08d}"
    if dist.rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    dist.barrier()
    _save_tensors(beside / f"rank-{dist.rank()}.pt", {"rng": torch.get_rng_state(), "method": dict(rank_state or {})})
    dist.barrier()
    if dist.rank() == 0:
        _save_tensors(beside / "model.pt", model.state_dict())
        _save_tensors(beside / "training.pt", training)
        _write_text(
            beside / "meta.json", json.dumps({"format": FORMAT, "step": step, "world": dist.world(), **meta}, indent=1)
        )
        sums = "".join(f"{_sha256(p)}  {p.name}\n" for p in sorted(beside.iterdir()))
        _write_text(beside / SUMS, sums)
        _sync_dir(beside)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(beside, final)
        _write_text(root / ".LAST", final.name + "\n")
        os.replace(root / ".LAST", root / "LAST")
        _sync_dir(root)
        _retire(root, keep)
    dist.barrier()
    return final


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint folder whose hashes all agree, or None. Broken ones are passed over with a warning."""
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        fault = check(folder)
        if fault is None:
            return folder
        print(f"warning: checkpoint {folder} is passed over: {fault}", file=sys.stderr, flush=True)
    return None


def check(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    sums = folder / SUMS
    if not sums.is_file():
        return f"{SUMS} is missing"
    listed = dict(line.split("  ", 1)[::-1] for line in sums.read_text().splitlines() if "  " in line)
    for name in ("model.pt", "training.pt", "meta.json"):
        if name not in listed:
            return f"{SUMS} does not list {name}"
    for name, digest in listed.items():
        path = folder / Path(name).name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} does not have the sha256 that {SUMS} says"
    return None


def load_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a checkpoint folder. Raises CheckpointError."""
    meta = json.loads((folder / "meta.json").read_text())
    if meta.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has checkpoint format {meta.get('format')!r}, this version reads {FORMAT}")
    return meta


def restore(folder: Path, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Load a whole folder (see `newest`) into `model`, set this rank's random state; returns training.pt's dict."""
    model.load_state_dict(_load_tensors(folder / "model.pt", device))
    own = folder / f"rank-{dist.rank()}.pt"
    if own.is_file():
        torch.set_rng_state(_load_tensors(own, torch.device("cpu"))["rng"])
    return _load_tensors(folder / "training.pt", device)


def load_rank_state(folder: Path) -> dict[str, Tensor] | None:
    """What `save` got as this rank's own state; None if another number of ranks wrote the folder."""
    if load_meta(folder)["world"] != dist.world():
        return None
    return _load_tensors(folder / f"rank-{dist.rank()}.pt", torch.device("cpu")).get("method", {})


def find(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest whole one of a run. Raises CheckpointError."""
    path = Path(path)
    if (path / "model.pt").is_file():
        fault = check(path)
        if fault:
            raise CheckpointError(f"checkpoint {path} is damaged: {fault}; take another one of the same run")
        return path
    folder = newest(path.parent if path.name == "checkpoints" else path)
    if folder is None:
        raise CheckpointError(f"no checkpoint at {path}; give a run directory, or a step-* folder of its checkpoints/")
    return folder


def load_backbone(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """The trained backbone of a run or checkpoint folder, on the CPU, in eval mode, and the folder's meta.

    Raises CheckpointError if there is none, or if its tensors do not fit the encoder that meta names.
    """
    folder = find(path)
    meta = load_meta(folder)
    backbone = build_encoder(**meta["config"]["encoder"])
    prefix = meta["backbone_prefix"]
    state = _load_tensors(folder / "model.pt", torch.device("cpu"))
    own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    try:
        backbone.load_state_dict(own)
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit encoder {meta['config']['encoder']}: {error}") from error
    return backbone.eval(), {**meta, "folder": str(folder), "num_features": backbone.num_features}


def load_method(path: str | Path) -> tuple[Method, Config]:
    """The whole trained method of a run or checkpoint folder, on the CPU, in eval mode, and the settings of its run.

    Raises CheckpointError if there is none, or if its tensors do not fit its settings.
    """
    folder = find(path)
    cfg = convert(Config, load_meta(folder)["config"])
    facts = RunFacts(role_counts(cfg.view_specs()), cfg.run.seed, Clock(1, cfg.run.batch_size))
    method = build_method(cfg.method, build_encoder(**dataclasses.asdict(cfg.encoder)), facts)
    try:
        method.load_state_dict(_load_tensors(folder / "model.pt", torch.device("cpu")))
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit its own settings: {error}") from error
    return method.eval(), cfg


def _retire(root: Path, keep: int) -> None:
    """Delete all but the `keep` newest whole checkpoints and any half-written one of an earlier life."""
    whole = [f for f in sorted(root.glob("step-*"), reverse=True) if (f / SUMS).is_file()]
    for old in [*whole[keep:], *root.glob(".writing-*")]:
        shutil.rmtree(old, ignore_errors=True)


def _save_tensors(path: Path, value: Any) -> None:
    with path.open("wb") as file:  # a Python file reports a full disk as OSError, torch's own writer as a riddle
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def _load_tensors(path: Path, device: torch.device) -> Any:
    return torch.load(path, map_location=device, weights_only=True)


def _write_text(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_dir(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
