"""Jobs for backends: files, and the numbers that are drawn for them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from pipelines import strong
from pipelines.augment import AugmentSpec
from pipelines.backends import Job, make
from pipelines.draw import draw_view
from pipelines.views import ViewSpec, flatten

MOCO_V1 = AugmentSpec(
    jitter_p=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, grayscale_p=0.2, grayscale_first=True
)
MOCO_V2 = AugmentSpec(jitter_p=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale_p=0.2, blur_p=0.5)
SWAV = AugmentSpec(jitter_p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grayscale_p=0.2, blur_p=0.5)
CLSA = replace(MOCO_V2, strong_draws=5)


def job_of(specs: Sequence[ViewSpec], files: Sequence[bytes], *, first_id: int = 0, epoch: int = 0) -> Job:
    sizes = np.array([Image.open(io.BytesIO(file)).size for file in files])
    ids = np.arange(first_id, first_id + len(files))
    draws = [draw_view(spec, view, 7, epoch, ids, sizes[:, 0], sizes[:, 1]) for view, spec in flatten(specs)]
    return Job(list(files), draws, [f"train-000000.tar:{i:09d}.jpg" for i in ids])


def strong_job(spec: ViewSpec, files: Sequence[bytes], name: str) -> Job:
    """Every strong draw is the operation `name`: at level 1 for the first file, 2 for the second, ...; then turned."""
    job = job_of([spec], files)
    places = np.arange(len(files), dtype=np.int8)[:, None] * np.ones(spec.augment.strong_draws, dtype=np.int8)
    draws = replace(
        job.draws[0],
        strong_operation=np.full_like(places, strong.POOL.index(name)),
        strong_level=1 + places % strong.LEVELS,
        strong_sign=1 - 2 * (places // strong.LEVELS % 2),
    )
    return Job(job.images, [draws], job.names)


def render(specs: Sequence[ViewSpec], job: Job, name: str, **options: Any) -> list[Tensor]:
    """The views of one job by the backend `name`, in `flatten` order."""
    defaults: dict[str, Any] = {"device": "cpu", "threads": 2, "output": "uint8", "depth": 2}
    backend = make(name, specs, len(job.images), **(defaults | options))
    backend.submit(job)
    views = backend.collect()
    backend.close()
    return views
