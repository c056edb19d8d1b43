"""Views by NVIDIA DALI, on a GPU or on the CPU: graph.py decodes and crops, inputs.py is what is fed to it, and the
colour chain follows as kernels (backends/fused_colour.py) or in NumPy (colour_on_cpu.py)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.backends import DecodeError, Job
from pipelines.views import ViewSpec, flatten

if TYPE_CHECKING:
    from pipelines.backends.fused_colour import FusedColour

try:
    from pipelines.backends.dali import inputs
    from pipelines.backends.dali.colour_on_cpu import ColourOnCpu
    from pipelines.backends.dali.graph import make_decoder, make_graph
except ModuleNotFoundError as error:
    if not (error.name or "").startswith("nvidia"):
        raise
    raise ValueError(
        "loader.backend=dali needs NVIDIA DALI, which is not installed; install fastssl-train[dali] (CUDA 13) or "
        "fastssl-train[dali-cuda12], or choose loader.backend=exact"
    ) from error


class DaliBackend:
    """Implements `pipelines.backends.Backend`; the pixels do not depend on `threads`, `depth` or the other samples.

    After a DecodeError the jobs behind the bad one can still be collected.
    """

    def __init__(
        self, specs: Sequence[ViewSpec], batch_size: int, *, device: str, threads: int, output: str, depth: int
    ) -> None:
        self.depth = depth
        self._specs = [spec for _, spec in flatten(specs)]
        self._place: dict[str, Any] = {"device": "cpu", "device_id": None}
        if torch.device(device).type == "cuda":
            self._place = {"device": "gpu", "device_id": _device_index(device)}
        # The queue length is 1 instead of `depth`, because a longer queue must be filled before the first batch starts.
        # It does not limit how many runs can be scheduled ahead.
        self._pipeline = make_graph(
            specs,
            self._newest_inputs,
            batch_size=batch_size,
            num_threads=threads,
            prefetch_queue_depth=1,
            **self._place,
        )
        self._pipeline.build()
        self._colour = _make_colour(self._specs, device, threads, output)
        self._jobs: deque[Job] = deque()

    def submit(self, job: Job) -> None:
        self._jobs.append(job)
        self._pipeline.schedule_run()  # asks for `_newest_inputs` before it returns

    def collect(self) -> list[Tensor]:
        job = self._jobs.popleft()
        try:
            outputs = self._pipeline.share_outputs()
        except RuntimeError as error:
            raise self._explain(job, error) from error
        views = [torch.from_dlpack(output.as_tensor()) for output in outputs]
        self._pipeline.release_outputs()  # the buffers live on in the tensors
        return self._colour(views, job.draws)

    def close(self) -> None:
        self._jobs.clear()
        self._pipeline = None
        self._colour.close()

    def _newest_inputs(self) -> list[Any]:
        job = self._jobs[-1]
        batch: list[Any] = [_as_arrays(job.images)]
        for spec, draws in zip(self._specs, job.draws):
            batch.extend(inputs.arrays(spec, draws).values())
        return batch

    def _explain(self, job: Job, error: RuntimeError) -> Exception:
        """The samples to blame, which DALI often does not name: decodes them all again, one by one."""
        decoder = make_decoder(batch_size=1, num_threads=1, prefetch_queue_depth=1, **self._place)
        faults = {}
        remedy = "pack the data again, `shard_tools pack` sets bad images aside, or choose loader.backend=exact"
        for i, image in enumerate(job.images):
            decoder.feed_input("encoded", _as_arrays([image]))
            try:
                (decoded,) = decoder.run()
            except RuntimeError:
                faults[i] = f"{job.names[i]} cannot be decoded by DALI; {remedy}"
                continue
            height, width, _ = decoded[0].shape()
            crops = np.stack([draws.crop[i] for draws in job.draws])
            if (crops[:, :2] + crops[:, 2:] > (height, width)).any():
                faults[i] = f"{job.names[i]} is {width} x {height} px, but its index says otherwise; {remedy}"
        return DecodeError(faults) if faults else error


def _make_colour(specs: Sequence[ViewSpec], device: str, threads: int, output: str) -> FusedColour | ColourOnCpu:
    if torch.device(device).type == "cpu":
        return ColourOnCpu(specs, threads, output)
    try:
        from pipelines.backends.fused_colour import FusedColour
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("triton"):
            raise
        raise ValueError(
            "loader.backend=dali on a GPU needs Triton, which is not installed although CUDA builds of torch for Linux"
            " bring it; install triton, or choose loader.backend=exact"
        ) from error
    return FusedColour(specs, torch.device(device), output)


def _as_arrays(images: Sequence[bytes]) -> list[npt.NDArray[np.uint8]]:
    return [np.frombuffer(image, dtype=np.uint8) for image in images]


def _device_index(device: str) -> int:
    if not torch.cuda.is_available():
        raise ValueError(f"loader.device is {device!r}, but no CUDA device can be used here; set it to cpu")
    index = torch.device(device).index
    return torch.cuda.current_device() if index is None else index
