"""What the dali backend costs on a CPU, beside DALI's own operators and DALI's own reader, in the same rounds.

    python -m bench.dali forms SHARDS --views moco_v2 --out bench/results/dali_forms_moco_v2.json
    python -m bench.dali reading SHARDS --views moco_v2 --out bench/results/dali_reading_moco_v2.json

forms    Views as the backend makes them (dali), as the oracle does (exact), and as graphs of DALI's own operators:
         `cheap` jitters in a fixed order with hue in YIQ, `faithful` in a random order with hue in HSV. Both have
         what DALI takes kindly: branches instead of masks, a named centre of contrast, blur as two filters.
reading  Decode and crops only, by the same graph: fed by our reader and external_source, through the whole Loader, and
         fed by fn.readers.webdataset. The views of both are compared byte by byte before anything is timed.

SHARDS is a split that shard_tools packed. In a round each contender runs once, for --seconds after a warm-up.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as node_math
from nvidia.dali.auto_aug import rand_augment

from bench.loader import rotated
from bench.peers import views as peer_views
from bench.peers.views import VIEWS, View
from fastssl import config
from fastssl.bench.rates import cpu_s
from fastssl.bench.record import Figure, Record
from pipelines.augment import AugmentSpec
from pipelines.backends.dali import graph, inputs
from pipelines.draw import draw_view
from pipelines.loader import Loader, read_once
from pipelines.views import ViewSpec, by_role, flatten
from shard_tools.manifest import Manifest

Node = Any  # of a DALI graph
Batches = Iterator[Any]  # every item stands for --batch images

_WARMUP_BATCHES = 4  # more than are on their way in any contender
_ORDERS = np.array(list(itertools.permutations(range(4))), dtype=np.int32)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("forms", "reading"))
    parser.add_argument("shards", type=Path)
    parser.add_argument("--views", choices=VIEWS, default="moco_v2")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=50, help="in `reading` a divisor of the number of images")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(argv)
    manifest = Manifest.load(str(options.shards.parent), options.shards.name)
    specs = config.load([f"method={options.views}", "data.root=none"]).view_specs()
    contenders = (forms if options.what == "forms" else readings)(manifest, specs, options)
    baseline = "cheap" if options.what == "forms" else "dali_reader"
    record = Record(
        what=f"{options.what} of the dali backend on a CPU, {options.views}",
        command=f"python -m bench.dali {options.what} SHARDS --views {options.views} --out FILE",
        figures=measure(contenders, baseline, options.rounds, options.seconds, options.batch),
        settings={
            "images": manifest.num_samples,
            "kilobytes_per_image": round(float(manifest.index()["size"].mean()) / 1000),
            "output": "uint8",
        }
        | {key: getattr(options, key) for key in ("views", "rounds", "seconds", "batch", "threads")},
    )
    record.save(options.out)
    for name, figure in record.figures.items():
        print(f"{name}: {figure.median:.3g} {figure.unit}, {figure.range[0]:.3g} to {figure.range[1]:.3g}")
    return 0


def measure(
    contenders: Mapping[str, Batches], baseline: str, rounds: int, seconds: float, batch: int
) -> dict[str, Figure]:
    """images_per_s and cpu_ms_per_image of each, and their ratios to the baseline of the same round."""
    values: dict[str, list[float]] = {}
    for turn in range(rounds):
        measured = {name: _rates(contenders[name], seconds, batch) for name in rotated(dict(contenders), turn)}
        for name in contenders:
            speed, cpu = measured[name]
            base_speed, base_cpu = measured[baseline]
            for key, value in {
                "images_per_s": speed,
                "cpu_ms_per_image": cpu,
                "speed_ratio": speed / base_speed,
                "cpu_ratio": cpu / base_cpu,
            }.items():
                values.setdefault(f"{name}/{key}", []).append(value)
    units = {"images_per_s": "images/s", "cpu_ms_per_image": "ms/image", "speed_ratio": "x", "cpu_ratio": "x"}
    return {name: Figure(units[name.rpartition("/")[2]], tuple(rounds)) for name, rounds in values.items()}


def _rates(batches: Batches, seconds: float, batch: int) -> tuple[float, float]:
    """images/s, and user and system time in ms per image."""
    for _ in range(_WARMUP_BATCHES):
        next(batches)
    began, cpu_began, num = time.perf_counter(), cpu_s(), 0
    while time.perf_counter() - began < seconds:
        next(batches)
        num += batch
    return num / (time.perf_counter() - began), 1000 * (cpu_s() - cpu_began) / num


def forms(manifest: Manifest, specs: Sequence[ViewSpec], options: argparse.Namespace) -> dict[str, Batches]:
    given = {"batch_size": options.batch, "seed": 0, "threads": options.threads}
    ours = {name: Loader(manifest, specs, backend=name, **given).batches() for name in ("dali", "exact")}
    graphs = {name: (_cheap_jitter, _faithful_jitter)[i] for i, name in enumerate(("cheap", "faithful"))}
    return ours | {
        name: _by_operators(manifest, VIEWS[options.views], jitter, options) for name, jitter in graphs.items()
    }


def readings(manifest: Manifest, specs: Sequence[ViewSpec], options: argparse.Namespace) -> dict[str, Batches]:
    """Raises ValueError if the two do not make the same views of the same images, or the batch divides them badly."""
    if manifest.num_samples % options.batch:
        raise ValueError(f"--batch is {options.batch}, but must divide {manifest.num_samples} images")
    plain = [replace(spec, augment=AugmentSpec()) for spec in specs]
    theirs = _by_dali_reader(manifest, plain, options)
    once = read_once(manifest, plain, batch_size=options.batch, backend="dali", threads=options.threads)
    views = by_role(plain, [torch.from_dlpack(view.as_tensor()).permute(0, 3, 1, 2) for view in next(theirs)])
    for role, of_role in next(once).views.items():
        if not all(torch.equal(a, b) for a, b in zip(of_role, views[role], strict=True)):
            raise ValueError(f"the {role} views are not the same with both readers; the comparison would mean nothing")
    once.close()  # type: ignore[attr-defined]  # a generator: its threads end here
    ours = Loader(
        manifest, plain, batch_size=options.batch, seed=0, threads=options.threads, backend="dali", order="window"
    )
    return {"dali_reader": theirs, "our_reader": ours.batches()}


def _by_dali_reader(manifest: Manifest, specs: Sequence[ViewSpec], options: argparse.Namespace) -> Batches:
    """The graph of the backend, where the files come from DALI's reader, in the order in which they are packed."""
    index = manifest.index()
    flat = flatten(specs)
    types_of, dims = graph.described([spec for _, spec in flat])

    def numbers(iteration: int) -> list[Any]:
        rows = np.arange(iteration * options.batch, (iteration + 1) * options.batch) % manifest.num_samples
        entries = index[rows]
        drawn = [(spec, draw_view(spec, view, 0, 0, rows, entries["width"], entries["height"])) for view, spec in flat]
        return [values for spec, draws in drawn for values in inputs.arrays(spec, draws).values()]

    @pipeline_def(batch_size=options.batch, num_threads=options.threads, device_id=None, prefetch_queue_depth=2)
    def pipeline() -> tuple[Node, ...]:
        given = fn.external_source(source=numbers, num_outputs=len(dims), dtype=types_of, ndim=dims)
        return graph.crops(_files(manifest), given, [spec for _, spec in flat], "cpu")

    return _outputs(pipeline())


def _by_operators(
    manifest: Manifest, views: Sequence[View], jitter: Callable[[Node, View], Node], options: argparse.Namespace
) -> Batches:
    @pipeline_def(
        batch_size=options.batch,
        num_threads=options.threads,
        device_id=None,
        prefetch_queue_depth=2,
        seed=1,
        enable_conditionals=True,
    )
    def pipeline() -> tuple[Node, ...]:
        image = fn.decoders.image(
            _files(manifest, random_shuffle=True), output_type=types.RGB, adjust_orientation=False
        )
        return tuple(_view(image, view, jitter) for view in views for _ in range(view.count))

    return _outputs(pipeline())


def _files(manifest: Manifest, **options: Any) -> Node:
    paths = [str(manifest.shard_path(shard)) for shard in range(len(manifest.shards))]
    indexes = [str(Path(path).with_suffix(".idx")) for path in paths]
    return fn.readers.webdataset(paths=paths, index_paths=indexes, ext=["jpg"], pad_last_batch=True, **options)


def _outputs(pipeline: Any) -> Batches:
    pipeline.build()
    while True:
        yield pipeline.run()


def _uniform(low: float, high: float) -> Node:
    return fn.random.uniform(range=[low, high])


def _coin(probability: float) -> Node:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def _view(image: Node, view: View, jitter: Callable[[Node, View], Node]) -> Node:
    x = fn.random_resized_crop(
        image, size=view.size, random_area=list(view.scale), antialias=True, interp_type=types.INTERP_LINEAR
    )
    sigma = _uniform(*peer_views.BLUR_SIGMA)
    if _coin(peer_views.JITTER_P):
        x = jitter(x, view)
    if _coin(peer_views.GRAYSCALE_P):
        x = _gray(x)
    if _coin(peer_views.BLUR_P):
        x = _blur(x, sigma)
    x = fn.flip(x, horizontal=fn.random.coin_flip(probability=peer_views.FLIP_P))
    if view.strong:
        for _ in range(5):
            if _coin(0.5):
                x = rand_augment.rand_augment(x, n=1, m=15, fill_value=0, interp_type=types.INTERP_NN)
    return x


def _gray(x: Node) -> Node:
    luma = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    return fn.cat(luma, luma, luma, axis=2)


def _blur(x: Node, sigma: Node) -> Node:
    """13 taps, along rows and then columns."""
    away = types.Constant(np.arange(-6, 7, dtype=np.float32)[None]) * (1.0 / sigma)
    weights = node_math.exp(-0.5 * away * away)
    kernel = weights / fn.reductions.sum(weights, keep_dims=True)
    return fn.filter(fn.filter(x, kernel), fn.transpose(kernel, perm=[1, 0]))


def _contrast(x: Node, factor: Node) -> Node:
    luma = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
    return fn.contrast(x, contrast=factor, contrast_center=fn.reductions.mean(luma))


def _cheap_jitter(x: Node, view: View) -> Node:
    """In a fixed order; saturation and hue are one turn and stretch in YIQ."""
    b, c, s, h = view.jitter
    x = _contrast(fn.brightness(x, brightness=_uniform(1 - b, 1 + b)), _uniform(1 - c, 1 + c))
    return fn.color_twist(x, saturation=_uniform(1 - s, 1 + s), hue=_uniform(-360 * h, 360 * h))


def _faithful_jitter(x: Node, view: View) -> Node:
    """In a random order, four slots with a choice of four in each; hue in HSV."""
    b, c, s, h = view.jitter
    brightness, contrast, saturation = (_uniform(1 - strength, 1 + strength) for strength in (b, c, s))
    hue = _uniform(-h, h)
    order = types.Constant(_ORDERS)[fn.random.uniform(values=list(range(24)), dtype=types.INT32)]
    for slot in range(4):
        operation = order[slot]
        if operation == 0:
            x = fn.brightness(x, brightness=brightness)
        elif operation == 1:
            x = _contrast(x, contrast)
        elif operation == 2:
            x = fn.saturation(x, saturation=saturation)
        else:
            x = _hue_in_hsv(x, hue)
    return x


def _hue_in_hsv(x: Node, turn: Node) -> Node:
    high = fn.reductions.max(x, axis_names="C", keep_dims=True)
    low = fn.reductions.min(x, axis_names="C", keep_dims=True)
    red, green, blue = (fn.cast(x[:, :, channel : channel + 1], dtype=types.FLOAT) for channel in range(3))
    spread = fn.cast(high, dtype=types.FLOAT) - low
    scale = 1.0 / node_math.max(spread, types.Constant(1.0, dtype=types.FLOAT))
    is_red = x[:, :, 0:1] == high
    is_green = (x[:, :, 1:2] == high) & (is_red ^ True)
    is_blue = (is_red | is_green) ^ True
    sixths = is_red * ((green - blue) * scale)
    sixths = sixths + is_green * ((blue - red) * scale + 2.0) + is_blue * ((red - green) * scale + 4.0)
    place = types.Constant(np.array([5.0, 3.0, 1.0], dtype=np.float32)) + (sixths + 6.0 * turn + 12.0)
    place = place - 6.0 * node_math.floor(place * (1 / 6.0))
    return fn.cast(high - spread * node_math.clamp(node_math.min(place, 4.0 - place), 0.0, 1.0), dtype=types.UINT8)


if __name__ == "__main__":
    sys.exit(main())
