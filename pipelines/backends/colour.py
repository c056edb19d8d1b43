"""Pillow's colour operations and blur on many small images at once, bit for bit, in NumPy.

Pillow itself needs a Python call or more for each operation on each image, which is most of the time at 32 px, and its
way through HSV is slow at any size. Here an operation is a few array passes over all the images of a task that have it.

Images are planes: uint8 (3, n, S, S), the red, green and blue of n images. A factor is one number per image (n,).
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

Planes = npt.NDArray[np.uint8]  # (3, n, S, S)
Plane = npt.NDArray[np.uint8]  # (n, S, S)
Factors = npt.NDArray[np.float32]  # (n,)

_BLUR_PASSES = 3  # ImageFilter.GaussianBlur approximates by three box blurs
_ONE = 1 << 24  # box weights are fixed-point numbers with 24 bits behind the point


def brightness(planes: Planes, factor: Factors) -> Planes:
    """`ImageEnhance.Brightness`: away from or towards black."""
    return _blend(None, planes, factor)


def contrast(planes: Planes, factor: Factors) -> Planes:
    """`ImageEnhance.Contrast`: away from or towards the image's mean luma, rounded to a whole grey."""
    gray = luma(planes)
    mean = gray.sum(axis=(1, 2), dtype=np.int64) / (gray.shape[1] * gray.shape[2])
    return _blend(np.floor(mean + 0.5).astype(np.float32)[:, None, None], planes, factor)


def saturation(planes: Planes, factor: Factors) -> Planes:
    """`ImageEnhance.Color`: away from or towards the grey image."""
    return _blend(luma(planes).astype(np.float32), planes, factor)


def luma(planes: Planes) -> Plane:
    """`convert("L")`: Rec. 601 luma in 16-bit fixed point."""
    total = planes[0].astype(np.uint32) * np.uint32(19595)
    total += planes[1].astype(np.uint32) * np.uint32(38470)
    total += planes[2].astype(np.uint32) * np.uint32(7471)
    total += np.uint32(0x8000)
    total >>= np.uint32(16)
    return total.astype(np.uint8)


def solarize(planes: Planes, threshold: int) -> Planes:
    """`ImageOps.solarize`: values at or above the threshold are inverted."""
    inverted = (planes >= threshold).view(np.uint8)
    inverted *= np.uint8(255)
    inverted ^= planes
    return inverted


def turn_hue(planes: Planes, fraction: Factors) -> Planes:
    """torchvision's `adjust_hue` on a Pillow image: H of the 8-bit HSV image is turned by int(255 * fraction) steps.

    Goes through HSV even where that is no step at all, as torchvision does: 8-bit HSV is not exact.
    """
    hue_of, chroma_of, gap_of = _hue_tables()
    red, green, blue = planes
    high = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    middle = red ^ green ^ blue ^ high ^ low
    spread = high - low

    # `code` says which of the six orders of red, green, blue a pixel has.
    code = (red >= green).view(np.uint8) + 2 * (green >= blue).view(np.uint8) + 4 * (blue >= red).view(np.uint8)
    index = code.astype(np.intp)
    index <<= 16
    index |= _pair(high - middle, spread)
    hue = hue_of.take(index, mode="clip")
    hue += (fraction.astype(np.float64) * 255).astype(np.int32).astype(np.uint8)[:, None, None]  # wraps round

    # A channel is high - chroma * gap, where the gap of red, green and blue depends on the hue alone.
    chroma = chroma_of.take(_pair(spread, high).astype(np.intp), mode="clip")
    rounded_up = high.astype(np.float32)
    rounded_up += np.float32(0.5)
    steps = hue.astype(np.intp)
    turned = np.empty_like(planes)
    for channel in range(3):
        value = gap_of[channel].take(steps, mode="clip")
        value *= chroma
        np.subtract(rounded_up, value, out=value)
        turned[channel] = value
    return turned


def gaussian_blur(planes: Planes, sigma: Factors) -> Planes:
    """`ImageFilter.GaussianBlur(radius=sigma)`: three box blurs along the rows, then three along the columns."""
    whole, weight, far_weight = box_weights(sigma)
    blurred = np.empty_like(planes)
    for reach in np.unique(whole).tolist():
        (chosen,) = np.nonzero(whole == reach)
        for channel in range(3):  # one by one, to stay in the cache
            weights = weight[chosen, None], far_weight[chosen, None]
            blurred[channel, chosen] = _box_blurs(planes[channel, chosen], reach, *weights)
    return blurred


def box_weights(
    sigma: Factors,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Of one box blur, a number per image: its reach in whole px, the weight of the pixels within, and that of the two
    beyond; weights in units of 2**-24."""
    radius = _box_radius(sigma)
    whole = radius.astype(np.int64)
    weight = (np.float32(_ONE) / (radius * 2 + 1)).astype(np.uint32)
    return whole, weight, (np.uint32(_ONE) - (2 * whole + 1).astype(np.uint32) * weight) // 2


def _blend(degenerate: npt.NDArray[np.float32] | None, planes: Planes, factor: Factors) -> Planes:
    """`Image.blend(degenerate, image, factor)`, clipped and cut to whole numbers; a degenerate None is black."""
    value = planes.astype(np.float32)
    if degenerate is not None:
        value -= degenerate
    value *= factor[:, None, None]
    if degenerate is not None:
        value += degenerate
    value.clip(0, 255, out=value)
    return value.astype(np.uint8)


def _pair(first: Plane, second: Plane) -> npt.NDArray[np.uint16]:
    pair = first.astype(np.uint16)
    pair <<= 8
    pair |= second
    return pair


@functools.cache
def _hue_tables() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Pillow's conversions between RGB and HSV, in its mixture of float32 and float64, as tables.

    hue     uint8 by (code << 16 | high - middle << 8 | high - low): H of a pixel
    chroma  float32 by (high - low << 8 | high): V * S of a pixel after S was rounded to 8 bits
    gap     float32 (3, 256) by H: how far red, green and blue lie below V, in units of V * S
    """
    spread = np.arange(1, 256, dtype=np.float32)
    to_middle = np.arange(256, dtype=np.float32)[:, None] / spread  # distance of the middle channel from the highest
    to_low = np.ones_like(to_middle)
    hue = np.zeros((8, 256, 256), dtype=np.uint8)
    # code: (offset of the sector, distance of the following channel, of the one after that); colorsys' formula.
    # The codes count bits red >= green (1), green >= blue (2), blue >= red (4); 7 is grey and 0 impossible.
    sectors = {
        3: (0, to_middle, to_low),  # red > green > blue
        1: (0, to_low, to_middle),  # red > blue > green
        6: (2, to_middle, to_low),  # green > blue > red
        2: (2, to_low, to_middle),  # green > red > blue
        5: (4, to_middle, to_low),  # blue > red > green
        4: (4, to_low, to_middle),  # blue > green > red
    }
    for code, (offset, following, other) in sectors.items():
        turn = (offset + other.astype(np.float64) - following).astype(np.float32)
        turn = np.fmod(turn.astype(np.float64) / 6 + 1, 1).astype(np.float32)
        hue[code, :, 1:] = (turn * 255.0).clip(0, 255)

    high = np.arange(256, dtype=np.float32)
    ratio = np.arange(256, dtype=np.float32)[:, None] / np.maximum(high, 1)
    saturation_8bit = (ratio.astype(np.float64) * 255).clip(0, 255).astype(np.uint8)
    chroma = (saturation_8bit / 255.0).astype(np.float32) * high

    position = np.arange(256, dtype=np.float32) * 6.0 / 255.0
    sector = np.floor(position)
    up = (position - sector).astype(np.float32)
    down = (1.0 - up.astype(np.float64)).astype(np.float32)
    none, full = np.zeros_like(up), np.ones_like(up)
    # Per sector, how far red lies below V; green follows two sectors later, blue four.
    gap_in_sector = np.stack([none, up, full, full, down, none])
    sectors_of = (sector.astype(np.int64) - np.array([[0], [2], [4]])) % 6
    gap = gap_in_sector[sectors_of, np.arange(256)]
    return hue.reshape(-1), chroma.reshape(-1), gap


def _box_radius(sigma: Factors) -> Factors:
    """Radius of the box whose triple application has variance sigma**2; Pillow's formula and float types.

    Gwosdek et al., "Theoretical foundations of Gaussian convolution by extended box filtering" (SSVM 2011).
    """
    variance = sigma * sigma / np.float32(_BLUR_PASSES)
    length = np.sqrt(12.0 * variance.astype(np.float64) + 1.0).astype(np.float32)
    whole = np.floor((length.astype(np.float64) - 1.0) / 2.0).astype(np.float32)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    part /= 6 * (variance - (whole + 1) * (whole + 1))
    return whole + part


def _box_blurs(
    images: Plane, reach: int, near: npt.NDArray[np.uint32], far: npt.NDArray[np.uint32]
) -> npt.NDArray[np.uint32]:
    """Box blurs of (n, S, S), along rows and then columns: the 2 * reach + 1 pixels around each one are weighted `near`
    (n, 1), the two beyond them `far`.

    The images lie in a frame as wide as a blur reaches, row after row without a gap, so that a shift is an offset and
    every operation one long loop. Sums that run across the end of a row land in the frame, which is filled anew.
    """
    num, side, _ = images.shape
    edge = reach + 1
    framed_side = side + 2 * edge
    before = np.empty((num, framed_side, framed_side), dtype=np.uint32)
    after = np.empty_like(before)
    before[:, edge:-edge, edge:-edge] = images
    scratch = np.empty((num, framed_side * framed_side), dtype=np.uint32)
    for stride in (1, framed_side):
        for _ in range(_BLUR_PASSES):
            along = before if stride == 1 else before.transpose(0, 2, 1)
            along[:, :, :edge] = along[:, :, edge : edge + 1]
            along[:, :, -edge:] = along[:, :, -edge - 1 : -edge]
            _box_blur(before.reshape(num, -1), reach, stride, near, far, scratch, after.reshape(num, -1))
            before, after = after, before
    return before[:, edge:-edge, edge:-edge]


def _box_blur(
    pixels: npt.NDArray[np.uint32],
    reach: int,
    stride: int,
    near: npt.NDArray[np.uint32],
    far: npt.NDArray[np.uint32],
    scratch: npt.NDArray[np.uint32],
    blurred: npt.NDArray[np.uint32],
) -> None:
    """One blur along the axis with that stride; neighbours are `stride` apart in the flattened images (n, pixels)."""
    margin = (reach + 1) * stride
    length = pixels.shape[1] - 2 * margin

    def shifted(by: int) -> npt.NDArray[np.uint32]:
        return pixels[:, margin + by * stride : margin + by * stride + length]

    total, inner = blurred[:, margin : margin + length], scratch[:, :length]
    if reach == 0:
        np.multiply(shifted(0), near, out=inner)
    else:
        np.add(shifted(-reach), shifted(reach), out=inner)
        for by in range(1 - reach, reach):
            inner += shifted(by)
        inner *= near
    np.add(shifted(-reach - 1), shifted(reach + 1), out=total)
    total *= far
    total += inner
    total += np.uint32(_ONE // 2)
    total >>= np.uint32(24)
