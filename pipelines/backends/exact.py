"""The oracle: views as torchvision makes them from Pillow images, bit for bit, on the CPU.

Pillow decodes, crops and resizes; the colour operations and the blur are done in NumPy, which gives Pillow's numbers in
less time (see colour.py). Everything that takes long releases the GIL, so a pool of threads serves large images well.
The strong draws are Pillow's again, image by image, as each image has operations of its own; five draws take about a
tenth of the time of their view, and half of that holds the GIL.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from pipelines import strong
from pipelines.augment import AugmentSpec
from pipelines.backends import DecodeError, Job, colour, faults_of, pillow, wait_for
from pipelines.draw import ViewDraws
from pipelines.views import ViewSpec, as_output, flatten

_TASK_PX = 2**16  # px of a view that a task works on at once: few calls for small images, and arrays that stay in L2

Pixels: TypeAlias = npt.NDArray[np.uint8]


class ExactBackend:
    """Implements `pipelines.backends.Backend`; the pixels do not depend on `threads`."""

    def __init__(
        self, specs: Sequence[ViewSpec], batch_size: int, *, device: str, threads: int, output: str, depth: int
    ) -> None:
        self.depth = depth
        self._specs = [spec for _, spec in flatten(specs)]
        self._device = torch.device(device)
        self._dtype = getattr(torch, output)
        largest_px = max(spec.size for spec in self._specs) ** 2
        self._images_per_task = min(max(1, _TASK_PX // largest_px), max(1, batch_size // threads))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fastssl-render")
        self._jobs: deque[tuple[list[Tensor], list[Future[None]]]] = deque()

    def submit(self, job: Job) -> None:
        num = len(job.images)
        pinned = self._device.type == "cuda"
        views = [torch.empty((num, s.size, s.size, 3), dtype=torch.uint8, pin_memory=pinned) for s in self._specs]
        pixels = [view.numpy() for view in views]
        starts = range(0, num, self._images_per_task)
        parts = [slice(start, min(start + self._images_per_task, num)) for start in starts]
        self._jobs.append((views, [self._pool.submit(self._render, job, part, pixels) for part in parts]))

    def collect(self) -> list[Tensor]:
        views, tasks = self._jobs.popleft()
        wait_for(tasks)
        return [self._finish(view, spec) for view, spec in zip(views, self._specs)]

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _finish(self, view: Tensor, spec: ViewSpec) -> Tensor:
        return as_output(view.permute(0, 3, 1, 2).to(self._device, non_blocking=True), spec, self._dtype)

    def _render(self, job: Job, part: slice, pixels: Sequence[Pixels]) -> None:
        """Write all views of the samples `part` into `pixels`, one array (B, S, S, 3) a view."""
        num = part.stop - part.start
        planes = [np.empty((3, num, spec.size, spec.size), dtype=np.uint8) for spec in self._specs]
        faults: dict[int, str] = {}
        for i in range(num):
            faults |= faults_of(self._decode_and_crop, job, part.start + i, [plane[:, i] for plane in planes])
        if faults:
            raise DecodeError(faults)
        for view, spec in enumerate(self._specs):
            apply_chain(planes[view], spec.augment, job.draws[view], part)
            _interleave(planes[view], job.draws[view].flip[part], pixels[view][part])
            apply_strong(pixels[view][part], job.draws[view], part)

    def _decode_and_crop(self, job: Job, i: int, planes: Sequence[Pixels]) -> None:
        """Decode sample i and write the crop of each view into `planes`, one array (3, S, S) a view."""
        image = pillow.decode(job, i)
        for view, spec in enumerate(self._specs):
            resized = _crop_and_resize(image, spec, job, view, i)
            lines = np.frombuffer(resized.tobytes("raw", "RGB;L"), dtype=np.uint8)  # a line of red, of green, ...
            planes[view][:] = lines.reshape(spec.size, 3, spec.size).swapaxes(0, 1)


def _crop_and_resize(image: Image.Image, spec: ViewSpec, job: Job, view: int, i: int) -> Image.Image:
    if spec.crop == "center":
        return _center_crop(image, spec)
    top, left, height, width = job.draws[view].crop[i].tolist()
    if left + width > image.width or top + height > image.height:
        raise pillow.other_size(job, i, image)
    # Not `resize(box=...)`: at the border of the box it would mix in pixels from outside, which torchvision does not.
    return image.crop((left, top, left + width, top + height)).resize((spec.size, spec.size), Image.Resampling.BILINEAR)


def _center_crop(image: Image.Image, spec: ViewSpec) -> Image.Image:
    """torchvision's Resize(spec.resize), which takes the shorter side, then CenterCrop(spec.size)."""
    long = int(spec.resize * max(image.size) / min(image.size))
    width, height = (spec.resize, long) if image.width <= image.height else (long, spec.resize)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - spec.size) / 2), round((height - spec.size) / 2)
    return resized.crop((left, top, left + spec.size, top + spec.size))


def apply_chain(planes: colour.Planes, augment: AugmentSpec, draws: ViewDraws, part: slice) -> None:
    """The chain of `AugmentSpec` up to the flip, in place on the planes (3, n, S, S) of the samples `part`."""
    if augment.grayscale_first:
        _apply(_grayscale, draws.grayscale[part], planes)
    operations: list[tuple[float, Callable[..., colour.Planes], npt.NDArray[np.float32]]] = [
        (augment.brightness, colour.brightness, draws.brightness[part]),
        (augment.contrast, colour.contrast, draws.contrast[part]),
        (augment.saturation, colour.saturation, draws.saturation[part]),
        (augment.hue, colour.turn_hue, draws.hue[part]),
    ]
    for turn in range(4):
        due = np.where(draws.jitter[part], draws.order[part, turn], -1)
        for number, (strength, operation, factor) in enumerate(operations):
            if strength > 0:
                _apply(operation, due == number, planes, factor)
    if not augment.grayscale_first:
        _apply(_grayscale, draws.grayscale[part], planes)
    sigma = draws.sigma[part]
    _apply(colour.gaussian_blur, sigma > 0, planes, sigma)
    _apply(lambda some: colour.solarize(some, augment.solarize_threshold), draws.solarize[part], planes)


def _apply(
    operation: Callable[..., npt.NDArray[np.uint8]],
    chosen: npt.NDArray[np.bool_],
    planes: colour.Planes,
    *factor: npt.NDArray[np.float32],
) -> None:
    """Replace the chosen images by what `operation` makes of them."""
    if chosen.all():
        planes[...] = operation(planes, *factor)
    elif chosen.any():
        (rows,) = chosen.nonzero()
        planes[:, rows] = operation(planes.take(rows, axis=1), *(numbers[rows] for numbers in factor))


def _grayscale(planes: colour.Planes) -> npt.NDArray[np.uint8]:
    return colour.luma(planes)[None]


def _interleave(planes: colour.Planes, flip: npt.NDArray[np.bool_], pixels: Pixels) -> None:
    """Planes (3, n, S, S), of which some are to be mirrored, to pixels (n, S, S, 3). Spoils the planes."""
    for i in flip.nonzero()[0].tolist():
        planes[:, i] = planes[:, i, :, ::-1]
    for channel in range(3):
        pixels[..., channel] = planes[channel]


def apply_strong(pixels: Pixels, draws: ViewDraws, part: slice) -> None:
    """The strong draws of the samples `part`, one after another, in place on their pixels (n, S, S, 3)."""
    operations, levels, signs = draws.strong_operation[part], draws.strong_level[part], draws.strong_sign[part]
    for i in (operations >= 0).any(axis=1).nonzero()[0].tolist():
        image = Image.fromarray(pixels[i])
        for operation, level, sign in zip(operations[i].tolist(), levels[i].tolist(), signs[i].tolist()):
            if operation >= 0:
                image = _STRONG[strong.POOL[operation]](image, level, sign)
        pixels[i] = np.asarray(image)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    """The centre (x, y) of an output pixel shows the input pixel around (a x + b y + c, d x + e y + f), or black."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


_STRONG: dict[str, Callable[[Image.Image, int, int], Image.Image]] = {  # (image, level, sign)
    "auto_contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "brightness": lambda image, level, sign: ImageEnhance.Brightness(image).enhance(strong.enhance_factor(level)),
    "saturation": lambda image, level, sign: ImageEnhance.Color(image).enhance(strong.enhance_factor(level)),
    "contrast": lambda image, level, sign: ImageEnhance.Contrast(image).enhance(strong.enhance_factor(level)),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "identity": lambda image, level, sign: image,
    "posterize": lambda image, level, sign: ImageOps.posterize(image, strong.posterize_bits(level)),
    "rotate": lambda image, level, sign: image.rotate(strong.rotate_deg(level, sign)),
    "sharpness": lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(strong.enhance_factor(level)),
    "shear_x": lambda image, level, sign: _affine(image, 1, strong.shear(level, sign), 0, 0, 1, 0),
    "shear_y": lambda image, level, sign: _affine(image, 1, 0, 0, strong.shear(level, sign), 1, 0),
    "solarize": lambda image, level, sign: ImageOps.solarize(image, strong.solarize_threshold(level)),
    "translate_x": lambda image, level, sign: _affine(
        image, 1, 0, strong.translate_px(level, sign, image.width), 0, 1, 0
    ),
    "translate_y": lambda image, level, sign: _affine(
        image, 1, 0, 0, 0, 1, strong.translate_px(level, sign, image.height)
    ),
}
