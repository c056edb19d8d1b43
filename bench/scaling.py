"""How many CPU cores, bytes per second and GPUs go together: a model on measured cores and stated GPUs.

    python -m bench.scaling [RECORD]               print the tables, from bench.loader's newest record or another
    python -m bench.scaling [RECORD] --write       put them into docs/scaling.md; --check exits 1 if they are stale
    python -m bench.scaling --sizes SHARDS SHORT   measure the bytes of an image, packed as it is and with --short-side

What a core makes and what an image weighs are measured. What a GPU takes is not: see `GPUS` and `PUBLISHED`. In between
is arithmetic: cores are taken to add up, links to carry what they are called.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.dali_bound import HBM_BYTES_PER_S, bounds, bytes_moved
from bench.figures import number
from fastssl import config
from fastssl.bench.record import Figure, Record, versions
from pipelines.views import ViewSpec, flatten
from shard_tools.manifest import Manifest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "scaling.md"
SIZES = ROOT / "bench" / "results" / "scale_image_sizes.json"
METHODS = {"moco_v2": "MoCo v2", "swav": "SwAV", "clsa_multi": "CLSA multi"}
FORMS = {"original": "fastssl_native", "short": "fastssl_native_short"}  # of the shards -> program of bench.loader
NODE_CORES = (16, 32, 64, 128, 192)
NODE_GPU = "A100"
IMAGENET = 1_281_167  # training images
_BLOCK = re.compile(r"^<!-- scaling: (?P<name>\w+) -->\n(?P<body>.*?)^<!-- end scaling -->$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Gpu:
    """images_per_s: ResNet-50 trained with labels at 224 px in mixed precision on one GPU; not measured here."""

    images_per_s: float
    source: str


_EXAMPLES = "NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md (NGC 21.03)"
GPUS = {
    "V100": Gpu(1156, f"one of a DGX-1 32GB: {_EXAMPLES}"),
    "A100": Gpu(2470, f"one of a DGX A100 80GB: {_EXAMPLES}"),
    # A time to 75.9 %, and not a rate: 35 epochs are an assumption, and MXNet as tuned for MLPerf is no PyTorch loop.
    "H100": Gpu(
        35 * IMAGENET / (13.466 * 60) / 8,
        "eight in 13.466 min, here taken as 35 epochs: MLPerf Training 3.0, 3.0-2053, as in"
        " developer.nvidia.com/deep-learning-performance-training-inference/training",
    ),
}
# What the authors' own runs took, views and all: method -> (GPU, images/s of one GPU, source).
PUBLISHED = {
    "moco_v2": ("V100", 200 * IMAGENET / (53 * 3600) / 8, "8 of them, 200 epochs in 53 h: facebookresearch/moco"),
    "swav": ("V100", IMAGENET / 220 / 64, "64 of them, an epoch in 3 min 40 s: facebookresearch/swav"),
}
LINKS = {  # bytes per second by their definition; what they reach is less
    "1 Gbit/s": 1e9 / 8,
    "SATA, 6 Gbit/s (8b/10b)": 6e8,
    "10 Gbit/s": 10e9 / 8,
    "PCIe 4.0 x4, one NVMe disk": 16e9 * 4 * 128 / 130 / 8,
    "100 Gbit/s": 100e9 / 8,
}


@dataclass(frozen=True)
class Measured:
    """images_per_s: (method, form) -> of one core; kilobytes: form -> of an image; image_px: of an image as it is."""

    images_per_s: Mapping[tuple[str, str], float]
    kilobytes: Mapping[str, float]
    image_px: float

    @classmethod
    def of(cls, loader: Record, sizes: Record) -> Measured:
        """Raises ValueError, naming the figure, where a record lacks one."""
        cores = loader.machine["cores"]
        rates = {
            (method, form): _median(loader, f"{method}/{program}/images_per_s") / cores
            for method in METHODS
            for form, program in FORMS.items()
        }
        kilobytes = {form: _median(sizes, f"{form}/kilobytes_per_image") for form in FORMS}
        return cls(rates, kilobytes, _median(sizes, "original/px_per_image"))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path, nargs="?")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--sizes", type=Path, nargs=2, metavar=("SHARDS", "SHORT"))
    options = parser.parse_args(argv)
    try:
        if options.sizes:
            measure_sizes(dict(zip(FORMS, options.sizes))).save(SIZES)
            return 0
        path = (options.record or newest_record()).resolve()
        found = tables(Record.load(path), Record.load(SIZES))
        if not (options.write or options.check):
            print("\n\n".join(found.values()))
            return 0
        fresh = rewritten(DOCUMENT.read_text(), found)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.check and fresh != DOCUMENT.read_text():
        print(f"the tables of {DOCUMENT.name} are stale; run python -m bench.scaling --write", file=sys.stderr)
        return 1
    DOCUMENT.write_text(fresh)
    return 0


def newest_record() -> Path:
    found = (ROOT / "bench" / "results").glob("loader_*.json")
    return max(found, key=lambda path: (Record.load(path).date, path.name))


def measure_sizes(shards: Mapping[str, Path]) -> Record:
    """Bytes and pixels of an image, on average over each packed split."""
    figures, counts = {}, {}
    for form, path in shards.items():
        index = Manifest.load(path).index()
        px = index["width"].astype(float) * index["height"]
        figures[f"{form}/kilobytes_per_image"] = Figure("kB", (float(index["size"].mean()) / 1000,))
        figures[f"{form}/px_per_image"] = Figure("px", (float(px.mean()),))
        counts[form] = len(index)
    return Record(
        what="bytes and pixels of the same photographs, packed as they are and with --short-side 256",
        command="python -m bench.scaling --sizes SHARDS SHORT",
        figures=figures,
        settings={"images": counts},
        versions=versions(("fastssl-train", "pillow")),
    )


def step_cost(specs: Sequence[ViewSpec]) -> float:
    """Work of an image's step in units of a labelled one of 224 px, as ResNet-50's grows with the pixels.

    Views without a gradient, those of the role "key", take the forward third of it. Head, queue and loss are left out.
    """
    return sum((spec.size / 224) ** 2 * (1 / 3 if spec.role == "key" else 1) for _, spec in flatten(specs))


def rates(method: str) -> dict[str, float]:
    """GPU -> images/s of a step at most; "V100, as published" is the authors' own run."""
    cost = step_cost(specs_of(method))
    found = {f"{name}, at most": gpu.images_per_s / cost for name, gpu in GPUS.items()}
    if method in PUBLISHED:
        gpu, published, _ = PUBLISHED[method]
        found = {f"{gpu}, as published": published, **found}
    return found


@functools.cache  # composing a configuration takes a good part of a second
def specs_of(method: str) -> list[ViewSpec]:
    return config.load([f"method={method}", "data.root=none"]).view_specs()


def tables(loader: Record, sizes: Record) -> dict[str, str]:
    """name of a block -> Markdown."""
    measured = Measured.of(loader, sizes)
    return {
        "measured": _measured(measured, loader),
        "cores": _cores(measured),
        "node": _node(measured),
        "links": _links(measured),
        "dali": _dali(measured),
        "sources": _sources(),
    }


def rewritten(text: str, found: Mapping[str, str]) -> str:
    """`text` with its blocks made anew. Raises ValueError unless each table has one."""
    names = [match["name"] for match in _BLOCK.finditer(text)]
    if sorted(names) != sorted(found):
        raise ValueError(f"{DOCUMENT.name} has blocks for {', '.join(names)}, but the tables are {', '.join(found)}")
    return _BLOCK.sub(lambda m: f"<!-- scaling: {m['name']} -->\n\n{found[m['name']]}\n\n<!-- end scaling -->", text)


def _measured(measured: Measured, loader: Record) -> str:
    rows = [
        [METHODS[method], *(number(measured.images_per_s[method, form], "images/s") for form in FORMS)]
        for method in METHODS
    ]
    rows.append(["kB of an image", *(number(measured.kilobytes[form], "kB") for form in FORMS)])
    rounds = {len(loader.figures[f"{method}/{FORMS['original']}/images_per_s"].rounds) for method in METHODS}
    machine = loader.machine
    caption = (
        f"What {machine['cores']} cores ({machine['cpu']}) made with {loader.settings['workers']} threads, divided by"
        f" the number of cores; median of {' to '.join(map(str, sorted(rounds)))} round(s), {loader.date}, commit"
        f" {loader.commit}. Images: {loader.settings['data']}, {loader.settings['median_size_px']} px in the median."
    )
    return f"{_table(['images/s a core', 'as they are', '--short-side 256'], rows)}\n\n{caption}"


def _cores(measured: Measured) -> str:
    rows = []
    for method, name in METHODS.items():
        for gpu, rate in rates(method).items():
            cores = (number(rate / measured.images_per_s[method, form], "cores") for form in FORMS)
            megabytes = (number(rate * measured.kilobytes[form] / 1000, "MB/s") for form in FORMS)
            rows.append([name, gpu, number(rate, "images/s"), *cores, *megabytes])
    head = ["method", "one GPU", "images/s", "cores", "cores, short", "MB/s", "MB/s, short"]
    return _table(head, rows)


def _node(measured: Measured) -> str:
    rows = []
    for method, name in METHODS.items():
        need = rates(method)[f"{NODE_GPU}, at most"]
        for form, label in (("original", "as they are"), ("short", "short")):
            fed = (cores * measured.images_per_s[method, form] / need for cores in NODE_CORES)
            rows.append([name, label, *(number(gpus, "GPUs") for gpus in fed)])
    return _table([f"{NODE_GPU}s fed", "shards", *(f"{cores} cores" for cores in NODE_CORES)], rows)


def _links(measured: Measured) -> str:
    rows = []
    for link, bytes_per_s in LINKS.items():
        carried = [bytes_per_s / (1000 * measured.kilobytes[form]) for form in FORMS]
        gpus = (carried[0] / rates(method)[f"{NODE_GPU}, at most"] for method in METHODS)
        rows.append([link, *(number(rate, "images/s") for rate in carried), *(number(x, "GPUs") for x in gpus)])
    head = ["link", "images/s", "images/s, short", *(f"{NODE_GPU}s, {name}" for name in METHODS.values())]
    return _table(head, rows)


def _dali(measured: Measured) -> str:
    rows = []
    for method, name in METHODS.items():
        specs, file_bytes = specs_of(method), 1000 * measured.kilobytes["original"]
        moved = sum(bytes_moved(specs, round(measured.image_px), file_bytes).values())
        least = min(bounds(specs, round(measured.image_px), file_bytes, moved, batch=256).items(), key=lambda x: x[1])
        rate = rates(method)["H100, at most"]
        share = rate * moved / HBM_BYTES_PER_S
        rows.append([name, number(rate, "images/s"), number(least[1], "images/s"), least[0], number(share, "share")])
    return _table(["method", "H100's step", "views", "which are limited by", "share of the memory's time"], rows)


def _sources() -> str:
    ceilings = [f"* {name}: {number(gpu.images_per_s, '')} images/s, {gpu.source}." for name, gpu in GPUS.items()]
    runs = [
        f"* {METHODS[method]} as published: {number(rate, '')} images/s on a {gpu}, {source}."
        for method, (gpu, rate, source) in PUBLISHED.items()
    ]
    costs = ", ".join(f"{name} {step_cost(specs_of(method)):.2f}" for method, name in METHODS.items())
    return "\n".join([*ceilings, *runs, f"* A step in units of a labelled one of 224 px: {costs}."])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    words = {0, *(i for i, cell in enumerate(rows[0]) if not cell[0].isdigit())}
    rule = "".join("---|" if i in words else "---:|" for i in range(len(head)))
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}", *(f"| {' | '.join(row)} |" for row in rows)])


def _median(record: Record, name: str) -> float:
    if name not in record.figures:
        raise ValueError(f"the record of `{record.command}` has no figure {name}; measure these views and shards too")
    return record.figures[name].median


if __name__ == "__main__":
    sys.exit(main())
