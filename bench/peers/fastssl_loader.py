"""fastssl's own Loader, from packed shards to batches, with the backend of --backend: a program of the peers' form.

Differs: all views are drawn from counters, so that they can be made again; normalised where they are used (uint8), or
by the loader (--output float32).
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from bench.peers.fidelity import SIZE
from bench.peers.measure import main
from fastssl import config
from pipelines.augment import AugmentSpec
from pipelines.backends import BACKENDS, OUTPUTS, Job, make
from pipelines.draw import draw_view
from pipelines.loader import Loader
from pipelines.views import ViewSpec
from shard_tools.manifest import Manifest


def batches(options):
    specs = config.load([f"method={options.views}", "data.root=none"]).view_specs()
    manifest = Manifest.load(str(options.shards.parent), options.shards.name)
    arguments = {"batch_size": options.batch, "seed": 0, "threads": options.workers}
    with Loader(manifest, specs, backend=options.backend, output=options.output, **arguments) as loader:
        yield from loader.batches()


def decode(path):
    return path.read_bytes()


def operations(backend: str) -> dict[str, Callable[[bytes, Any], np.ndarray]]:
    """Each operation alone, through the backend itself: one view whose draws ask for it and for nothing else."""

    def render(jpeg: bytes, augment: AugmentSpec, crop: Sequence[int] = (0, 0, SIZE, SIZE), size=SIZE, **draws: Any):
        spec = ViewSpec("query", size, augment=dataclasses.replace(augment, flip_p=0.0))
        still = draw_view(spec, 0, seed=0, epoch=0, ids=[0], widths=[size], heights=[size])
        given = {key: np.array([value], getattr(still, key).dtype) for key, value in {"crop": crop, **draws}.items()}
        made = make(backend, [spec], 1, device="cpu", threads=1, output="uint8", depth=1)
        try:
            made.submit(Job([jpeg], [dataclasses.replace(still, **given)], ["photo"]))
            (view,) = made.collect()
            return view[0].permute(1, 2, 0).numpy().copy()
        finally:
            made.close()

    def jitter(key: str):
        # The other three have strength 0 and are left out; this one's strength only has to be above it.
        augment = AugmentSpec(jitter_p=1.0, **{key: 0.5})  # type: ignore[arg-type]
        return lambda jpeg, p: render(jpeg, augment, **{key: p})

    return {
        "crop_224": lambda jpeg, p: render(jpeg, AugmentSpec(), *p),
        "crop_96": lambda jpeg, p: render(jpeg, AugmentSpec(), *p),
        **{key: jitter(key) for key in ("brightness", "contrast", "saturation", "hue")},
        "grayscale": lambda jpeg, p: render(jpeg, AugmentSpec(grayscale_p=1.0)),
        "blur": lambda jpeg, p: render(jpeg, AugmentSpec(blur_p=1.0), sigma=p),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--backend", choices=[name for name in BACKENDS if name != "stamps"], default="exact")
    parser.add_argument("--output", choices=OUTPUTS, default="uint8")
    options, _ = parser.parse_known_args()
    output = {"uint8": "uint8 NHWC, normalised by the user"}.get(options.output, f"{options.output} NHWC, normalised")
    main(batches, output, decode, operations(options.backend), parser)
