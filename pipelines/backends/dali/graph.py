"""The DALI graph: one text for the CPU and the GPU, encoded bytes and drawn numbers in, views out.

Nothing is random here: every number comes in through an input (inputs.py). The pixels are torchvision's on Pillow
images, to the tolerances in docs/pipelines.md. Where DALI's own operator means something else, or takes long on a CPU,
the same result is put together from operators that are fast on both. Between the operators images are uint8 HWC, as
they are in torchvision, so every operation ends with Pillow's rounding.

AutoGraph turns an `if` on a node into a split of the batch, so that only the samples that an operation is meant for pay
for it. It cannot read lambdas, and inputs must be declared outside of such an `if`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali import math as node_math

from pipelines.augment import AugmentSpec
from pipelines.backends.dali import inputs
from pipelines.backends.dali.inputs import BRIGHTNESS, CONTRAST, HUE, SATURATION
from pipelines.views import ViewSpec, flatten

Node = Any  # nvidia.dali.data_node.DataNode, whose operators are not typed
Inputs = dict[str, Node]
Source = Callable[[], list[Any]]

_TYPES = {"bool": types.BOOL, "uint8": types.UINT8, "int32": types.INT32, "float32": types.FLOAT}
_OUTPUT_TYPES = {"float32": types.FLOAT, "float16": types.FLOAT16}

# Pillow's ImageEnhance cuts the fraction off, DALI rounds. Not 0.5, so that whole numbers stay what they are.
_CUT = -0.4999
_CUT_SHIFT = _CUT / 255  # in the units of `brightness_shift`

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], dtype=np.float32) / 13  # Pillow's ImageFilter.SMOOTH
_OVER_ALL_PIXELS: dict[str, Any] = {"axis_names": "HW", "keep_dims": True}  # a statistic (1, 1, 3)


def make_graph(specs: Sequence[ViewSpec], source: Source, *, device: str, output: str, **options: Any) -> Pipeline:
    """The pipeline, not built.

    source  called once a run; returns a batch as a list: the encoded images, then all of `inputs.arrays` of each view
    device  "cpu" or "gpu"
    options     `nvidia.dali.Pipeline`'s
    """
    return _graph([spec for _, spec in flatten(specs)], source, device, output, **options)


@pipeline_def(enable_conditionals=True)
def _graph(specs: Sequence[ViewSpec], source: Source, device: str, output: str) -> tuple[Node, ...]:
    described = [inputs.arrays(spec, inputs.blank_draws()) for spec in specs]
    arrays = [values for view in described for values in view.values()]
    encoded, *numbers = fn.external_source(
        source=source,
        num_outputs=1 + len(arrays),
        dtype=[types.UINT8] + [_TYPES[values.dtype.name] for values in arrays],
        ndim=[1] + [values.ndim - 1 for values in arrays],
    )
    image = _decode(encoded, device)
    constants = {}
    if any(spec.augment.strong_draws > 0 for spec in specs):
        constants = {
            "smooth": types.Constant(_SMOOTH, device=device),
            "smooth_place": types.Constant(np.array([[0, 0], [1, 1]], dtype=np.int32)),
        }
    views = []
    for spec, names in zip(specs, described):
        given = constants | dict(zip(names, numbers))
        if device == "gpu":  # kernels are data, which must be where the images are; all else must stay on the CPU
            given |= {name: given[name].gpu() for name in ("blur_rows", "blur_columns") if name in given}
        numbers = numbers[len(names) :]
        views.append(_view(image, spec, given, device, output))
    return tuple(views)


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


def _view(image: Node, spec: ViewSpec, given: Inputs, device: str, output: str) -> Node:
    """One view, uint8 or normalised. What the spec cannot use is not among the inputs and leaves no node."""
    augment = spec.augment
    x = _crop_and_resize(image, spec, given)
    if augment.grayscale_first and given.get("grayscale", False):
        x = _grayscale(x)
    for step, number in enumerate(inputs.jitter_steps(augment)):
        if given[f"step{step}"]:
            x = _colour_operation(number, x, augment, given, device)
    if not augment.grayscale_first and given.get("grayscale", False):
        x = _grayscale(x)
    if given.get("blur", False):
        x = _gaussian_blur(x, given["blur_rows"], given["blur_columns"])
    if given.get("solarize", False):
        x = _solarize(x, augment.solarize_threshold)
    for draw in range(augment.strong_draws):
        x = _strong_draw(x, given, f"strong{draw}_", spec.size, device)
    return x if output == "uint8" else _normalize(x, augment, output)


def _crop_and_resize(image: Node, spec: ViewSpec, given: Inputs) -> Node:
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


def _colour_operation(number: int, x: Node, augment: AugmentSpec, given: Inputs, device: str) -> Node:
    if number == BRIGHTNESS:
        x = _brightness(x, given["brightness"])
    if number == CONTRAST:
        x = _contrast(x, given["contrast"], device)
    if number == SATURATION:
        x = _saturation(x, given["saturation"], augment.saturation)
    if number == HUE:
        x = _hue(x, augment, given)
    return x


def _brightness(x: Node, factor: Node) -> Node:
    return fn.brightness(x, brightness=factor, brightness_shift=_CUT_SHIFT)


def _contrast(x: Node, factor: Node, device: str) -> Node:
    """Around the rounded mean luma of the image. DALI's default centre, 128, is 5 to 8 grey levels off on average."""
    center = node_math.floor(fn.reductions.mean(_luma(x)) + 0.5)
    if device == "cpu":
        x = fn.brightness_contrast(x, contrast=factor, contrast_center=center, brightness_shift=_CUT_SHIFT)
    else:  # a named argument cannot come from the GPU
        x = fn.cast(factor * (x - center) + center + _CUT, dtype=types.UINT8)
    return x


def _saturation(x: Node, factor: Node, strength: float) -> Node:
    """Away from or towards the luma. fn.saturation is the same up to rounding, but takes twice as long on a CPU."""
    return _blend(x, _grayscale(x), factor, strength)


def _blend(x: Node, without: Node, factor: Node, strength: float) -> Node:
    """x * f + without * (1 - f), cut off, for f <= 1 + strength: in int16 with as many bits behind the point as fit."""
    bits = max(0, int(math.log2(32767 / (255 * (1 + strength)))))
    one = float(2**bits)
    scaled = fn.brightness(x, brightness=factor * one, dtype=types.INT16)
    scaled_without = fn.brightness(without, brightness=(1.0 - factor) * one, dtype=types.INT16)
    return fn.cast((scaled + scaled_without) >> bits, dtype=types.UINT8)


def _hue(x: Node, augment: AugmentSpec, given: Inputs) -> Node:
    """A turn in HSV, which keeps the largest and the smallest channel of a pixel: in uint8 and without computing H.

    As the hue goes round, each channel follows the same trapezoid wave between `low` and `high`, a third of the circle
    apart. Turning by t sixths of the circle (0 <= t <= 1) moves a channel along its ramp by t * (high - low). How much
    of that, and which way, follows from the next channel in the circle, its neighbour n (of red green, of green blue,
    of blue red):

        up   = max(0, high - (1 - t) (high - low) - n)      but not beyond `high`
        down = max(0, n - low - (1 - t) (high - low))       but not below `low`

    For t < 0 the neighbour is the other one, and a turn by thirds exchanges channels. No difference below is negative
    and no sum exceeds 255. (fn.hue turns in YIQ and so keeps the luma: another colour, 4 to 8 grey levels away.)
    """
    planes = fn.reshape(_repack(x, "CHW"), layout="FHW")  # as a sequence, whose frames can be put in any order
    red, green, blue = [_plane(planes, channel) for channel in range(3)]
    high = node_math.max(node_math.max(red, green), blue)
    low = node_math.min(node_math.min(red, green), blue)
    keep = fn.brightness(high - low, brightness=given["hue_keep"])  # (1 - t) (high - low)
    upper, lower, high, low = [_three_channels(plane) for plane in (low + keep, high - keep, high, low)]

    neighbour = _repack(fn.sequence_rearrange(planes, new_order=given["hue_neighbour"]), "HWC")
    if given.get("hue_exchanges", False):
        x = _repack(fn.sequence_rearrange(planes, new_order=given["hue_exchanged"]), "HWC")
    up = node_math.max(lower, neighbour) - neighbour
    down = neighbour - node_math.min(upper, neighbour)
    return x + node_math.min(up, high - x) - node_math.min(down, x - low)


def _repack(x: Node, layout: str) -> Node:
    """uint8 images with their axes as `layout` says, by the fastest transposition that DALI has on a CPU."""
    x = fn.reshape(x, layout="CHW" if layout == "HWC" else "HWC")
    return fn.crop_mirror_normalize(x, dtype=types.UINT8, output_layout=layout, mean=[0.0], std=[1.0])


def _plane(planes: Node, channel: int) -> Node:
    """One of the planes (3, H, W) as an image (H, W, 1). fn.slice copies byte by byte; this is a memcpy."""
    plane = fn.sequence_rearrange(planes, new_order=[channel])
    return fn.reshape(plane, rel_shape=[1, 1, 1], src_dims=[1, 2, 0], layout="HWC")


def _luma(x: Node) -> Node:
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)


def _three_channels(plane: Node) -> Node:
    return fn.color_space_conversion(plane, image_type=types.GRAY, output_type=types.RGB)


def _grayscale(x: Node) -> Node:
    return _three_channels(_luma(x))


def _gaussian_blur(x: Node, rows: Node, columns: Node) -> Node:
    """By Pillow's box blurs as kernels: nearer to Pillow than fn.gaussian_blur, in a tenth of its time on a CPU."""
    return fn.filter(fn.filter(x, rows, border="clamp"), columns, border="clamp")


def _solarize(x: Node, threshold: int) -> Node:
    values = [value if value < threshold else 255 - value for value in range(256)]
    return fn.lookup_table(x, keys=list(range(256)), values=values, dtype=types.UINT8)


def _strong_draw(x: Node, given: Inputs, draw: str, size: int, device: str) -> Node:
    """One of the strong draws, whose inputs begin with `draw`. A sample needs one of these operations or none.

    The splits are the price on a CPU: what lies within costs next to nothing as long as few samples need it.
    """
    if given[draw + "moves"]:
        x = fn.warp_affine(x, matrix=given[draw + "matrix"], interp_type=types.INTERP_NN, fill_value=0)
    if given[draw + "masks"]:
        x = _posterize_or_solarize(x, given[draw + "mask"])
    if given[draw + "auto_contrast"]:
        x = _auto_contrast(x)
    if given[draw + "equalize"]:
        x = _equalize(x)
    if given[draw + "brightness"]:
        x = _brightness(x, given[draw + "factor"])
    if given[draw + "contrast"]:
        x = _contrast(x, given[draw + "factor"], device)
    if given[draw + "saturation"]:
        x = _saturation(x, given[draw + "factor"], strength=0.0)
    if given[draw + "sharpness"]:
        x = _blend(x, _smooth(x, given, size), given[draw + "factor"], strength=0.0)
    return x


def _posterize_or_solarize(x: Node, mask: Node) -> Node:
    """mask: the bits to keep, and the largest value that is not inverted. One of the two is 255 and changes nothing.

    All in uint8. Tables would take long to build: DALI needs 45 us for each number that is an argument.
    """
    bits, largest = mask[0], mask[1]
    return (x & bits) ^ ((x > largest) * bits)


def _auto_contrast(x: Node) -> Node:
    """Each channel from low..high to 0..255. A channel of one value stays as it is.

    fn.brightness also rounds, in a quarter of the time that fn.cast takes on a CPU.
    """
    low, high = fn.reductions.min(x, **_OVER_ALL_PIXELS), fn.reductions.max(x, **_OVER_ALL_PIXELS)
    width = high - low
    above = x - low * (width > 0)
    stretched = above * (255.0 / (width + 255 * (width == 0)))
    return fn.brightness(stretched, brightness_shift=_CUT_SHIFT, dtype=types.UINT8)


def _equalize(x: Node) -> Node:
    """Per channel: (pixels of smaller value) / step, where step = (pixels below the largest value) // 255.

    fn.equalize counts the pixels of the same value too, but not those of the smallest: so from the negative image it
    makes the negative of what is wanted. Its step is not a whole number, for which `below / (255 * step)` makes up.
    """
    levels = _negative(fn.equalize(_negative(x)))
    is_below = fn.reinterpret(x < fn.reductions.max(x, **_OVER_ALL_PIXELS), dtype=types.UINT8)
    below = fn.cast(fn.reductions.sum(is_below, **_OVER_ALL_PIXELS), dtype=types.INT32)
    below = node_math.max(below, 255)  # there are none in a channel of one value, which fn.equalize leaves as it is
    return fn.brightness(levels * (below / (255 * (below // 255))), dtype=types.UINT8)


def _negative(x: Node) -> Node:
    return fn.brightness(x, brightness=-1.0, brightness_shift=1.0)


def _smooth(x: Node, given: Inputs, size: int) -> Node:
    """Pillow's SMOOTH, which keeps the pixels along the border as they are."""
    inside = fn.filter(x, given["smooth"], mode="valid")
    return fn.multi_paste(x, inside, out_anchors=given["smooth_place"], output_size=[size, size])


def _normalize(x: Node, augment: AugmentSpec, output: str) -> Node:
    return fn.crop_mirror_normalize(
        x,
        dtype=_OUTPUT_TYPES[output],
        output_layout="HWC",
        mean=[255 * m for m in augment.mean],
        std=[255 * s for s in augment.std],
    )
