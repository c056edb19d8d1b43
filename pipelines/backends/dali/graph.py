"""The DALI graph: one text for the CPU and the GPU, encoded bytes and drawn windows in, uint8 crops out.

Nothing is random here: every number comes in through an input (inputs.py). The pixels are torchvision's on Pillow
images, to the tolerances in docs/pipelines.md. The graph ends where each view has its size. In the chain that follows
most samples need another operation than their neighbours; DALI can express that as splits of the batch only, at a price
per sample and node that no size of GPU lowers, and it has neither Pillow's contrast nor its hue. So the chain is
kernels of our own on a GPU (backends/fused_colour.py), and that of the exact backend on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nvidia.dali import Pipeline, fn, pipeline_def, types

from pipelines.backends.dali import inputs
from pipelines.views import ViewSpec, flatten

Node = Any  # nvidia.dali.data_node.DataNode, whose operators are not typed
Source = Callable[[], list[Any]]

_TYPES = {"int32": types.INT32, "float32": types.FLOAT}


def make_graph(specs: Sequence[ViewSpec], source: Source, *, device: str, **options: Any) -> Pipeline:
    """The pipeline, not built. Its outputs are uint8 HWC, one a view in `flatten` order.

    source  called once a run; returns a batch as a list: the encoded images, then all of `inputs.arrays` of each view
    device  "cpu" or "gpu"
    options     `nvidia.dali.Pipeline`'s
    """
    return _graph([spec for _, spec in flatten(specs)], source, device, **options)


@pipeline_def
def _graph(specs: Sequence[ViewSpec], source: Source, device: str) -> tuple[Node, ...]:
    types_of, dims = described(specs)
    encoded, *numbers = fn.external_source(
        source=source, num_outputs=1 + len(dims), dtype=[types.UINT8, *types_of], ndim=[1, *dims]
    )
    return crops(encoded, numbers, specs, device)


def described(specs: Sequence[ViewSpec]) -> tuple[list[Any], list[int]]:
    """DALI's type, and the dimensions of a sample, of each of the numbers that `crops` takes."""
    blank = inputs.blank_draws()
    arrays = [values for spec in specs for values in inputs.arrays(spec, blank).values()]
    return [_TYPES[values.dtype.name] for values in arrays], [values.ndim - 1 for values in arrays]


def crops(encoded: Node, numbers: Sequence[Node], specs: Sequence[ViewSpec], device: str) -> tuple[Node, ...]:
    """Encoded images to one crop a spec. numbers: all of `inputs.arrays` of each spec, on the CPU."""
    image = _decode(encoded, device)
    left = iter(numbers)
    names = [list(inputs.arrays(spec, inputs.blank_draws())) for spec in specs]
    return tuple(_crop_and_resize(image, spec, {name: next(left) for name in of}) for spec, of in zip(specs, names))


@pipeline_def
def make_decoder(device: str) -> Node:
    """Decodes its input "encoded" as the graph of `make_graph` does, and nothing else."""
    return _decode(fn.external_source(name="encoded", dtype=types.UINT8, ndim=1), device)


def _decode(encoded: Node, device: str) -> Node:
    """RGB as Pillow decodes it: EXIF orientation ignored and, on the GPU, chroma interpolated as libjpeg does."""
    return fn.decoders.image(
        encoded,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )


def _crop_and_resize(image: Node, spec: ViewSpec, given: dict[str, Node]) -> Node:
    """Antialiased bilinear. The flip is part of it: it commutes with all that follows, and costs nothing here.

    A random crop is cut out first, because to resize a window of the whole image reads pixels from beside the window,
    which torchvision does not. multi_paste of one piece onto a canvas of its size is a crop; it takes a tenth of the
    time of fn.slice on a CPU. A center crop comes after the resize, so there the window is the faithful form.
    """
    if spec.crop == "random_resized":
        image = fn.multi_paste(
            image, in_anchors=given["crop_start"], shapes=given["crop_shapes"], output_size=given["crop_shape"]
        )
    window = {}
    if "window_start" in given:
        window = {"roi_start": given["window_start"], "roi_end": given["window_end"]}
    return fn.resize(image, size=(spec.size, spec.size), interp_type=types.INTERP_LINEAR, antialias=True, **window)
