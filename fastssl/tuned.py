"""Loader settings found by measuring: `fastssl-bench mode=tune` writes them, every training run looks for them.

They fill only what a run leaves open (loader.backend=auto, loader.threads=0, loader.prefetch=0), and only on the
machine and for the views that were measured. There is one file for a method with its views and a machine, in
$FASTSSL_TUNED, or else in $XDG_CONFIG_HOME/fastssl/tuned (~/.config/fastssl/tuned): hosts may share a home folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fastssl.settings import Config, require
from shard_tools.documents import read_json
from shard_tools.printing import sentence

FORMAT = "fastssl-tuned"
MAX_FILE_BYTES = 2**14  # ours have 500
MAX_THREADS, MAX_PREFETCH = 1024, 64  # beyond, a file is no measurement


@dataclass(frozen=True)
class Tuned:
    """What was found, and for what.

    machine     as `this_machine` has it
    views       hash of the views; a method with other views has other costs
    images_per_s    median that these settings reached; of training or of the loader alone, as `objective` says
    """

    method: str
    machine: dict[str, Any]
    views: str
    backend: Literal["dali", "native", "exact", "stamps"]
    threads: int
    prefetch: int
    objective: str
    images_per_s: float
    date: str

    def __post_init__(self) -> None:
        require(1 <= self.threads <= MAX_THREADS, "threads", self.threads, f"1 to {MAX_THREADS}")
        require(1 <= self.prefetch <= MAX_PREFETCH, "prefetch", self.prefetch, f"1 to {MAX_PREFETCH}")


def folder() -> Path:
    if given := os.environ.get("FASTSSL_TUNED"):
        return Path(given)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "fastssl" / "tuned"


def path_of(tuned: Tuned) -> Path:
    return folder() / f"{tuned.method}-{_digest([tuned.machine, tuned.views])[:12]}.json"


def save(tuned: Tuned) -> Path:
    """Write the file where runs find it; an older one for the same method, views and machine is replaced."""
    path = path_of(tuned)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps({"format": FORMAT, **asdict(tuned)}, indent=1) + "\n")
    beside.replace(path)
    return path


def fill(cfg: Config) -> Config:
    """`cfg` with the loader settings that it leaves open taken from a tuned file, if one is for this machine.

    Says on stderr, in one sentence, what was taken, or why a file for the method was not.
    """
    loader = cfg.loader
    is_open = {"backend": loader.backend == "auto", "threads": loader.threads == 0, "prefetch": loader.prefetch == 0}
    name = str(cfg.method.get("name"))
    wanted = any(is_open.values()) and re.fullmatch(r"\w+", name)
    files = sorted(folder().glob(f"{name}-*.json")) if wanted else []
    if not files:
        return cfg
    views = views_digest(cfg)
    found = {path: tuned for path in files if (tuned := _load(path)) and tuned.views == views}
    here = next((path for path, tuned in found.items() if tuned.machine == this_machine(cfg)), None)
    if here is None:
        if found:
            other = next(iter(found))
            _say(f"{other} was tuned on another machine, so it is not used; run fastssl-bench mode=tune here")
        return cfg
    tuned = found[here]
    if not is_open["backend"] and loader.backend != tuned.backend:
        return cfg  # threads and prefetch were found for another backend
    taken = {key: getattr(tuned, key) for key, is_one in is_open.items() if is_one}
    _say(f"{', '.join(f'loader.{key}={value}' for key, value in taken.items())} as tuned on {tuned.date} ({here})")
    return dataclasses.replace(cfg, loader=dataclasses.replace(loader, **taken))


def this_machine(cfg: Config) -> dict[str, Any]:
    """What decides how fast a loader is, for one rank of the run: cores are those that a rank has for itself."""
    import torch

    from fastssl.bench.record import cpu_name
    from pipelines.loader import available_cores

    on_gpu = cfg.run.device != "cpu" and torch.cuda.is_available()
    return {"cpu": cpu_name(), "cores": available_cores(), "device": "cuda" if on_gpu else "cpu"}


def views_digest(cfg: Config) -> str:
    return _digest([asdict(spec) for spec in cfg.view_specs()])


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _load(path: Path) -> Tuned | None:
    from fastssl.config import convert

    try:
        document = read_json(path, MAX_FILE_BYTES)
        if not isinstance(document, dict) or document.pop("format", None) != FORMAT:
            return None
        return convert(Tuned, document)
    except (OSError, ValueError):
        return None  # a file of another version, or not ours: as good as none


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"loader: {sentence(text)}", file=sys.stderr)
