"""Checkpoints: a folder a step, plain tensors and JSON, hashed, and complete or not there at all.

    <run>/checkpoints/step-00000500/model.pt       the method's state_dict
                                    training.pt    optimiser and GradScaler
                                    rank-0.pt      what differs by rank: random states, the method's rank_state()
                                    meta.json      step, config, fingerprint of the data, versions
                                    SHA256SUMS     of all the others
    <run>/checkpoints/LAST                         name of the newest, for people: nothing here reads it

A folder is written under another name, synced and renamed when all ranks have written, and LAST moves after it. Reading
checks every hash before a tensor is used and walks back to the newest folder that is whole. Nothing here unpickles
objects. While a save is under way, or after one that was killed, there may also be
    .writing-step-*     not complete
    .replaced-step-*    a whole checkpoint whose step was saved again: found like any other, until it is too old
    .deleting-step-*    on its way out
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import resource
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import dist
from fastssl.checkpoint_files import (
    SUMS,
    CheckpointError,
    DamagedError,
    read_json,
    read_tensors,
    seal,
    verify,
    write_tensors,
    write_text,
)
from fastssl.config import convert
from fastssl.methods import Method, RunFacts, build_method
from fastssl.nn.encoder import build_encoder
from fastssl.rejection import refuse_not_finite
from fastssl.schedule import Clock
from fastssl.settings import Config, EncoderConfig
from pipelines.views import role_counts
from shard_tools import exit_codes
from shard_tools.disk import DiskFull, sync_folder

__all__ = [
    "SUMS", "CheckpointError", "DamagedError", "SaveFailedElsewhere", "check", "find", "fitting", "load_backbone",
    "load_meta", "load_method", "load_rank_states", "load_settings", "newest", "restore", "save",
]  # fmt: skip

FORMAT = 1
MAX_RANKS = 1 << 16  # of a folder that is read: how many rank files its meta.json may ask for
CPU = torch.device("cpu")

_STEP = re.compile(r"(\.replaced-)?step-(\d{8,18})")


class SaveFailedElsewhere(CheckpointError):
    """Another rank could not write its part, and has said why."""

    exit_code = exit_codes.PEER_FAILED


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

    Nothing is dropped but what is older than two checkpoints that are whole, by hash. A collective: every rank must
    call it. If one rank cannot write, all raise, the older checkpoints are untouched, and nothing is left of this one:
    the rank raises DiskFull, or CheckpointError for other reasons, and the others raise SaveFailedElsewhere.
    Raises NotFinite on all ranks, before anything is written, if a tensor of one holds a NaN or an infinity.
    """
    root = run_dir / "checkpoints"
    final, beside = root / f"step-{step:08d}", root / f".writing-step-{step:08d}"
    own = {**_random_states(), "method": dict(rank_state or {})}
    refuse_not_finite({"model": model.state_dict(), "training": training, "rank": own}, f"{final} is not written")
    num_bytes = _num_bytes([model.state_dict(), training, own]) + (dist.world() - 1) * _num_bytes(own)
    main, together = dist.rank() == 0, functools.partial(_on_all_ranks_or_none, root, step, num_bytes)
    with together():
        if main:
            new = not root.is_dir()
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            for folder in (root, run_dir, run_dir.absolute().parent) if new else ():
                sync_folder(folder)
    with together():
        write_tensors(beside / _rank_file(dist.rank()), own)
    with together():
        if main:
            write_tensors(beside / "model.pt", model.state_dict())
            write_tensors(beside / "training.pt", training)
            facts = {**meta, "format": FORMAT, "step": step, "world": dist.world()}
            write_text(beside / "meta.json", json.dumps(facts, indent=1))
            seal(beside, _names(dist.world()))
            sync_folder(beside)
            write_text(root / ".LAST", final.name + "\n")
            _publish(beside, final)
            os.replace(root / ".LAST", root / "LAST")
            sync_folder(root)
            _retire(root, keep, final)
    return final


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint folder whose hashes all agree; None if there is no checkpoint.

    Damaged ones are passed over with a warning. Raises DamagedError if all are: to begin anew is for a human to say.
    """
    faults = []
    for folder in _folders(run_dir / "checkpoints"):
        fault = check(folder)
        if fault is None:
            return folder
        print(f"warning: checkpoint {folder} is passed over: {fault}", file=sys.stderr, flush=True)
        faults.append(f"{folder.name}: {fault}")
    if faults:
        raise DamagedError(
            f"no checkpoint in {run_dir / 'checkpoints'} is whole ({'; '.join(faults[:3])}); put one back, or give "
            "another run.dir to begin anew",
            faults[0],
        )
    return None


def check(folder: Path) -> str | None:
    """What is damaged in a checkpoint folder, or None. Raises CheckpointError if another version wrote it."""
    try:
        meta = load_meta(folder)
        verify(folder, _names(meta["world"]))
    except DamagedError as error:
        return error.fault
    named = _STEP.fullmatch(folder.name)
    if named and int(named[2]) != meta["step"]:
        return f"it is of step {meta['step']}, under another step's name"
    return None


def load_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a checkpoint folder: format, step and world, and what `save` was given. Raises CheckpointError."""
    meta = read_json(folder, "meta.json")
    if meta.get("format") != FORMAT:
        written = textwrap.shorten(repr(meta.get("format")), 40)
        raise CheckpointError(f"{folder} has checkpoint format {written}, this version of fastssl reads {FORMAT}")
    for key, least, most in (("step", 0, 10**18), ("world", 1, MAX_RANKS)):
        if type(meta.get(key)) is not int or not least <= meta[key] <= most:
            raise DamagedError.of(folder, f"{key} in meta.json is not a number from {least} to {most}")
    return meta


def load_settings(folder: Path) -> dict[str, Any]:
    """The settings of the training run that wrote the folder. Raises CheckpointError if it was no such run."""
    settings: Any = load_meta(folder).get("config")
    groups = [settings]
    if isinstance(settings, dict):
        groups += [settings.get("encoder"), *(settings.get(key, {}) for key in ("augment", "data", "knn", "views"))]
        groups += settings["views"].values() if isinstance(settings.get("views"), dict) else []
    if not all(isinstance(group, dict) for group in groups):
        raise CheckpointError(f"{folder} is not of a run of fastssl-train; give a checkpoint of one")
    return settings


def restore(folder: Path, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Load a whole folder (see `newest`) into `model`, set this rank's random states; returns training.pt's dict.

    Raises CheckpointError if it does not fit the model.
    """
    with fitting(folder, "model.pt"):
        model.load_state_dict(read_tensors(folder, "model.pt", device))
    _restore_random_states(folder, device)
    return read_tensors(folder, "training.pt", device)


def load_rank_states(folder: Path) -> list[dict[str, Tensor]]:
    """What `save` got as each rank's own state, in rank order. Raises CheckpointError."""
    ranks = range(load_meta(folder)["world"])
    return [read_tensors(folder, _rank_file(rank), CPU).get("method", {}) for rank in ranks]


@contextlib.contextmanager
def fitting(folder: Path, name: str) -> Iterator[None]:
    """Around the use of what file `name` holds: what does not fit is raised as CheckpointError, in one sentence."""
    try:
        yield
    except CheckpointError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = textwrap.shorten(" ".join(str(error).split()), 300, placeholder=" ...")
        raise CheckpointError(
            f"{folder / name} does not fit these settings, in this version of fastssl: {why}; take a checkpoint of the "
            "same settings, or give another run.dir"
        ) from error


def find(path: str | Path) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest whole one of a run. Raises CheckpointError."""
    path = Path(path)
    if _is_checkpoint(path):
        fault = check(path)
        if fault:
            raise DamagedError.of(path, fault)
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
    settings, meta = load_settings(folder), load_meta(folder)
    with fitting(folder, "meta.json"):
        backbone = build_encoder(**dataclasses.asdict(convert(EncoderConfig, settings["encoder"], "encoder")))
    with fitting(folder, "model.pt"):
        prefix, state = meta["backbone_prefix"], read_tensors(folder, "model.pt", CPU)
        backbone.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return backbone.eval(), {**meta, "folder": str(folder), "num_features": backbone.num_features}


def load_method(path: str | Path) -> tuple[Method, Config]:
    """The whole trained method of a run or checkpoint folder, on the CPU, in eval mode, and the settings of its run.

    Raises CheckpointError if there is none, or if its tensors do not fit its settings.
    """
    folder = find(path)
    with fitting(folder, "meta.json"):
        cfg = convert(Config, load_settings(folder))
        facts = RunFacts(role_counts(cfg.view_specs()), cfg.run.seed, Clock(1, cfg.run.batch_size))
        method = build_method(cfg.method, build_encoder(**dataclasses.asdict(cfg.encoder)), facts)
    with fitting(folder, "model.pt"):
        method.load_state_dict(read_tensors(folder, "model.pt", CPU))
    return method.eval(), cfg


def _folders(root: Path) -> list[Path]:
    """Checkpoints by their names, the newest first, and one that was replaced after the one in its place."""
    try:
        names = [match for match in map(_STEP.fullmatch, os.listdir(root)) if match]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [root / name[0] for name in sorted(names, key=lambda n: (int(n[2]), not n[1]), reverse=True)]


def _is_checkpoint(path: Path) -> bool:
    """Whether `path` is meant as one checkpoint, whole or not, and no run."""
    return path.is_dir() and (
        _STEP.fullmatch(path.name) is not None
        or any(os.path.lexists(path / name) for name in (SUMS, "meta.json", "model.pt"))
    )


def _names(world: int) -> set[str]:
    """What `world` ranks write."""
    return {"model.pt", "training.pt", "meta.json", *map(_rank_file, range(world))}


def _rank_file(rank: int) -> str:
    return f"rank-{rank}.pt"


def _publish(beside: Path, final: Path) -> None:
    """Give a complete folder its name. A whole checkpoint of that name can be found at every moment."""
    if os.path.lexists(final):
        if _is_whole(final):
            aside = final.with_name(f".replaced-{final.name}")
            _delete(aside)
            os.rename(final, aside)
        else:
            _delete(final)
    os.rename(beside, final)


def _retire(root: Path, keep: int, written: Path) -> None:
    """Delete what is older than the `keep` newest and than two that are whole, and what killed saves have left.

    The one just `written` is whole: its hashes were read back from its files.
    """
    num_kept = num_whole = 0
    for folder in _folders(root):
        if num_kept >= keep and num_whole >= 2:
            try:
                _delete(folder)
            except OSError as error:  # nothing is lost by it but room
                print(f"warning: {folder} cannot be deleted ({error.strerror})", file=sys.stderr, flush=True)
            continue
        num_kept += not folder.name.startswith(".")
        if num_whole < 2:
            num_whole += folder == written or _is_whole(folder)
    for left in [*root.glob(".writing-step-*"), *root.glob(".deleting-step-*")]:
        shutil.rmtree(left, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Also of another version's, which is not ours to delete."""
    try:
        return check(folder) is None
    except CheckpointError:
        return True


def _delete(folder: Path) -> None:
    """Out of sight at once, so that no half of it is ever taken for a checkpoint."""
    if not os.path.lexists(folder):
        return
    doomed = folder.with_name(f".deleting-{folder.name.removeprefix('.replaced-')}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    if doomed.is_symlink() or not doomed.is_dir():
        doomed.unlink()
    else:
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def _on_all_ranks_or_none(root: Path, step: int, num_bytes: int) -> Iterator[None]:
    """What all ranks do inside is done on all, or an OSError of one of them undoes the save and raises on all."""
    failure = None
    try:
        yield
    except OSError as error:
        failure = error
    if not dist.any_rank(failure is not None):
        return
    if dist.rank() == 0:
        shutil.rmtree(root / f".writing-step-{step:08d}", ignore_errors=True)
    dist.barrier()
    if failure is None:
        raise SaveFailedElsewhere(f"step {step} could not be saved by another rank, which says why")
    raise _explained(failure, root, step, num_bytes) from failure


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file would be larger than is allowed",
}


def _explained(error: OSError, root: Path, step: int, num_bytes: int) -> ValueError:
    kept = next((f"{folder} is kept" for folder in _folders(root) if _is_whole(folder)), "there is none before it")
    where = f"{root}/step-{step:08d}/{Path(error.filename or '').name}"
    if error.errno not in _FULL:
        return CheckpointError(
            f"the checkpoint {where} cannot be written ({error.strerror}); {kept}; make {root} writable and give the "
            "same command"
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    allowed = f", and ulimit -f allows {limit:,}" if error.errno == errno.EFBIG and limit > 0 else ""
    return DiskFull(
        f"the checkpoint {where} cannot be written: {_FULL[error.errno]} ({error.strerror}); it takes {num_bytes:,} "
        f"bytes, {shutil.disk_usage(root).free:,} are free{allowed}; {kept}; make room and give the same command"
    )


def _num_bytes(value: Any) -> int:
    """What torch.save writes of the tensors in nested dicts and lists: each storage once, and whole."""
    storages: dict[int, int] = {}

    def walk(node: Any) -> None:
        if isinstance(node, Tensor):
            storages[node.untyped_storage().data_ptr()] = node.untyped_storage().nbytes()
        for child in node.values() if isinstance(node, Mapping) else node if isinstance(node, list | tuple) else ():
            walk(child)

    walk(value)
    return sum(storages.values())


def _random_states() -> dict[str, Tensor]:
    states = {"rng": torch.get_rng_state()}
    return states | {"cuda_rng": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else states


def _restore_random_states(folder: Path, device: torch.device) -> None:
    """This rank's own. A rank that did not exist is seeded by rank 0's state and its own number, each time alike."""
    known = load_meta(folder)["world"]
    name = _rank_file(dist.rank() if dist.rank() < known else 0)
    with fitting(folder, name):
        states = read_tensors(folder, name, CPU)
        if dist.rank() >= known:
            digest = hashlib.sha256(states["rng"].numpy().tobytes() + f" rank {dist.rank()}".encode()).digest()
            torch.manual_seed(int.from_bytes(digest[:7], "big"))
            return
        torch.set_rng_state(states["rng"])
        if device.type == "cuda" and "cuda_rng" in states:
            torch.cuda.set_rng_state(states["cuda_rng"])
