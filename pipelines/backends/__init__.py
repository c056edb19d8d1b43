"""Backends turn encoded images and drawn numbers into pixels. None of them draws a random number.

A backend renders the views of one batch per job. `submit` queues a job and returns at once where the backend can work
in the background; `collect` waits for the oldest job. At most `depth` jobs are in flight. The order of the jobs and the
number of threads never change the pixels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from pipelines.draw import ViewDraws
from pipelines.views import ViewSpec

BACKENDS = ("dali", "native", "exact", "stamps")
DECODES = ("full", "scaled")
OUTPUTS = ("uint8", "float32", "float16")


@dataclass
class Job:
    """One batch to render.

    images  encoded image files of B samples
    draws   one entry per view, in the order of `pipelines.views.flatten`, each for the same B samples
    names   "shard:member" of each sample, for messages
    """

    images: Sequence[bytes]
    draws: Sequence[ViewDraws]
    names: Sequence[str]


class Backend(Protocol):
    """Built as `make(specs, batch_size, device, threads, output, depth)`, that of stamps with `bands` too.

    batch_size is the largest B of a job.
    """

    depth: int

    def submit(self, job: Job) -> None: ...

    def collect(self) -> list[torch.Tensor]:
        """The views of the oldest job, in `flatten` order, each (B, C, S, S) in channels-last memory.

        uint8 output is raw pixels 0..255; float32 and float16 are normalised with the spec's mean and std. Views of
        stamps are always the latter, float32 where the output is uint8.
        Raises DecodeError naming all samples that cannot be decoded; the jobs behind it are not touched.
        """
        ...

    def close(self) -> None: ...


class DecodeError(RuntimeError):
    """Samples that no decoder accepts; the message names shard and member of each.

    faults  place in the job -> what is wrong there
    """

    def __init__(self, faults: Mapping[int, str]) -> None:
        self.faults = dict(sorted(faults.items()))
        super().__init__("; ".join(self.faults.values()))


def wait_for(tasks: Iterable[Future[None]]) -> None:
    """Until all tasks of a job are done. Raises one DecodeError for the bad samples of all of them."""
    faults: dict[int, str] = {}
    for task in tasks:
        faults |= faults_of(task.result)
    if faults:
        raise DecodeError(faults)


def faults_of(work: Callable[..., None], *arguments: Any) -> dict[int, str]:
    """The faults of the DecodeError that `work(*arguments)` ends with; none if it ends well."""
    try:
        work(*arguments)
    except DecodeError as error:
        return error.faults
    return {}


def chosen(name: str, device: str, bands: int = 0) -> str:
    """The backend that `make` builds for `name` on `device`, for stamps of `bands` bands or photographs (0).

    Where the native kernel cannot be used, "exact" stands in for "native".
    """
    if name == "auto" and bands:
        return "stamps"
    if name == "auto":
        name = "native" if device == "cpu" else "dali"
    return "exact" if name == "native" and why_not_native() else name


def why_not_native() -> str:
    """Why the native backend's kernel cannot be used here, one sentence with the remedy; "" if it can."""
    from pipelines.native import kernel

    return kernel.why_not()


def make(
    name: str,
    specs: Sequence[ViewSpec],
    batch_size: int,
    *,
    device: str,
    threads: int,
    output: str,
    depth: int,
    bands: int = 0,
    decode: str = "full",
) -> Backend:
    """The backend `name`: dali, native, exact, stamps, or auto (dali on a GPU, native on a CPU; stamps for stamps).

    device  "cpu" or a CUDA device such as "cuda:0"
    bands   of the stamps, as `Manifest.bands` has it; 0 for photographs
    decode  "full" or, with the native backend, "scaled" (see native.py)
    Raises ValueError with the remedy for an unknown name, for views or a backend that the data cannot have, or when a
    backend's package is not installed.
    """
    if output not in OUTPUTS:
        raise ValueError(f"loader.output is {output!r}, but must be one of {', '.join(OUTPUTS)}")
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"loader.backend is {name!r}, but must be auto or one of {', '.join(BACKENDS)}")
    asked, name = name, chosen(name, device, bands)
    if name == "exact" and asked != name:
        warnings.warn(
            f"Pillow and NumPy make the views, which takes four times as long: {why_not_native()}", stacklevel=2
        )
    if decode not in DECODES:
        raise ValueError(f"loader.decode is {decode!r}, but must be one of {', '.join(DECODES)}")
    if decode == "scaled" and name != "native":
        raise ValueError(f"loader.decode is 'scaled', which the {name} backend cannot do; set it to full")
    if bool(bands) != (name == "stamps"):
        what = f"these shards hold stamps of {bands} bands" if bands else "these shards hold photographs"
        raise ValueError(f"loader.backend is {name!r}, but {what}; leave it at auto")
    if name == "stamps":
        from pipelines.backends.stamps import StampsBackend

        return StampsBackend(specs, batch_size, device=device, threads=threads, output=output, depth=depth, bands=bands)
    _check_photographs(specs)
    if name == "native":
        from pipelines.backends.native import NativeBackend

        return NativeBackend(
            specs, batch_size, device=device, threads=threads, output=output, depth=depth, decode=decode
        )
    if name == "exact":
        from pipelines.backends.exact import ExactBackend

        return ExactBackend(specs, batch_size, device=device, threads=threads, output=output, depth=depth)
    from pipelines.backends.dali import DaliBackend

    return DaliBackend(specs, batch_size, device=device, threads=threads, output=output, depth=depth)


def _check_photographs(specs: Sequence[ViewSpec]) -> None:
    for spec in specs:
        wrong = {
            "crop": (spec.crop, spec.crop == "turned"),
            "shows": (spec.shows, spec.shows == "positive"),
            "augment.stretch": (spec.augment.stretch, spec.augment.stretch != "none"),
            "augment.mean": (spec.augment.mean, len(spec.augment.mean) != 3),
        }
        for key, (value, is_wrong) in wrong.items():
            if is_wrong:
                raise ValueError(
                    f"views.{spec.role}.{key} is {value!r}, but that is for stamps, and these shards hold photographs;"
                    " pack stamps with `shard_tools pack hdf5`, or set it as for a photograph"
                )
