"""fastssl's own Loader, from packed shards to batches, with the backend of --backend: a program of the peers' form.

Differs: all views are drawn from counters, so that they can be made again; normalised where they are used (uint8), or
by the loader (--output float32).
"""

import argparse
import dataclasses

from bench.peers.fidelity import SIZE
from bench.peers.measure import main
from fastssl import config
from pipelines.augment import AugmentSpec
from pipelines.backends import BACKENDS, OUTPUTS, Job, make
from pipelines.draw import ViewDraws, draw_view
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


def render(jpeg: bytes, size: int, crop: tuple[int, int, int, int], augment: AugmentSpec, **draws) -> object:
    """uint8 (size, size, 3): one view of one image with these draws and no others."""
    spec = ViewSpec("query", size, augment=dataclasses.replace(augment, flip_p=0.0))
    still: ViewDraws = draw_view(spec, 0, seed=0, epoch=0, ids=[0], widths=[size], heights=[size])
    given = {key: [value] for key, value in {"crop": crop, **draws}.items()}
    arrays = {key: getattr(still, key).dtype.type(value) for key, value in given.items()}
    backend = make(options.backend, [spec], 1, device="cpu", threads=1, output="uint8", depth=1)
    try:
        backend.submit(Job([jpeg], [dataclasses.replace(still, **arrays)], ["photo"]))
        (view,) = backend.collect()
        return view[0].permute(1, 2, 0).numpy().copy()
    finally:
        backend.close()


def crop(jpeg, parameter):
    window, size = parameter
    return render(jpeg, size, window, AugmentSpec())


def jitter(key):
    """One of the jitter's four; the others have strength 0, and a strength that allows the parameter is given."""
    augment = AugmentSpec(jitter_p=1.0, **{key: 0.5 if key == "hue" else 1.0})
    return lambda jpeg, p: render(jpeg, SIZE, (0, 0, SIZE, SIZE), augment, **{key: p})


OPERATIONS = {
    "crop_224": crop,
    "crop_96": crop,
    **{key: jitter(key) for key in ("brightness", "contrast", "saturation", "hue")},
    "grayscale": lambda jpeg, p: render(jpeg, SIZE, (0, 0, SIZE, SIZE), AugmentSpec(grayscale_p=1.0), grayscale=True),
    "blur": lambda jpeg, p: render(jpeg, SIZE, (0, 0, SIZE, SIZE), AugmentSpec(blur_p=1.0), sigma=p),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", choices=[name for name in BACKENDS if name != "stamps"], default="exact")
    parser.add_argument("--output", choices=OUTPUTS, default="uint8")
    options, _ = parser.parse_known_args()
    output = {"uint8": "uint8 NHWC, normalised by the user"}.get(options.output, f"{options.output} NHWC, normalised")
    main(batches, output, decode, OPERATIONS, parser)
