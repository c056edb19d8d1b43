"""The Triton kernels of fused_colour.py, and the row of numbers that tells them what each sample needs.

    mean_luma       the mean that the contrast turns around; only samples with a contrast do anything
    jitter          grayscale and the four colour operations, in the sample's own order
    blur_rows       three box blurs along the rows; only samples with a blur do anything
    finish          three box blurs along the columns, solarize; uint8 out or normalised
    strong_table    the table of 256 values that a strong draw of its sample is, where it is one
    strong_apply    a table, a blend or a move of pixels; the last draw writes what `finish` would

The arithmetic is that of colour.py, step by step: whole numbers, and floating point where Pillow has it, in its width.
That needs divisions rounded to nearest and no fused multiply-add, so the launches say enable_fp_fusion=False.

The grid of all but strong_table is (samples, blocks of BLOCK pixels; of BLOCK values for blur_rows and finish). Pixels
are uint8 (B, S, S, 3). `rows` is (B, row) int32 and `floats` the same memory as float32; `size` is S in px.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipelines import strong

# A row of numbers is int32; those marked f hold a float32. ORDER: four of the operations below, then -1.
ORDER = tl.constexpr(0)
BEFORE_CONTRAST = tl.constexpr(4)  # how many operations come before the contrast; -1: there is none
HUE_STEPS = tl.constexpr(5)
GRAYSCALE = tl.constexpr(6)
BLUR = tl.constexpr(7)
SOLARIZE = tl.constexpr(8)
_LUMA_SUM = tl.constexpr(9)  # 0 as the row arrives; mean_luma adds to it, modulo 2**32
BRIGHTNESS_FACTOR, CONTRAST_FACTOR, SATURATION_FACTOR = tl.constexpr(10), tl.constexpr(11), tl.constexpr(12)  # f
WEIGHTS = tl.constexpr(13)  # of a box blur, uint32: of the pixel itself, of its neighbours, ...; as many as its reach

BRIGHTNESS, CONTRAST, SATURATION, HUE = (tl.constexpr(number) for number in range(4))  # as in ViewDraws.order

# A strong draw, from its first number on. KIND is its place in `strong.POOL`, or -1.
KIND = tl.constexpr(0)
BITS = tl.constexpr(1)  # posterize: those to keep
THRESHOLD = tl.constexpr(2)  # solarize
FACTOR = tl.constexpr(3)  # f
MATRIX = tl.constexpr(4)  # six numbers in 1/65536 px: from (x, y) of a pixel to the place whose pixel it shows
STRONG_NUMBERS = 10

_AUTO_CONTRAST = tl.constexpr(strong.POOL.index("auto_contrast"))
_STRONG_BRIGHTNESS = tl.constexpr(strong.POOL.index("brightness"))
_STRONG_SATURATION = tl.constexpr(strong.POOL.index("saturation"))
_STRONG_CONTRAST = tl.constexpr(strong.POOL.index("contrast"))
_EQUALIZE = tl.constexpr(strong.POOL.index("equalize"))
_POSTERIZE = tl.constexpr(strong.POOL.index("posterize"))
_ROTATE = tl.constexpr(strong.POOL.index("rotate"))
_SHARPNESS = tl.constexpr(strong.POOL.index("sharpness"))
_SHEAR_X, _SHEAR_Y = tl.constexpr(strong.POOL.index("shear_x")), tl.constexpr(strong.POOL.index("shear_y"))
_STRONG_SOLARIZE = tl.constexpr(strong.POOL.index("solarize"))
_TRANSLATE_X = tl.constexpr(strong.POOL.index("translate_x"))
_TRANSLATE_Y = tl.constexpr(strong.POOL.index("translate_y"))


@triton.jit
def mean_luma(pixels, rows, floats, row, size, GRAYSCALE_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(0)
    rows += sample * row
    floats += sample * row
    before = tl.load(rows + BEFORE_CONTRAST)
    if before >= 0:
        r, g, b, inside, _ = _load_pixels(pixels, sample, size, BLOCK)
        if GRAYSCALE_FIRST:
            r, g, b = _grayscale_if_due(r, g, b, rows)
        for turn in range(before):
            r, g, b = _operation(r, g, b, tl.load(rows + ORDER + turn), rows, floats, size)
        tl.atomic_add(rows + _LUMA_SUM, tl.sum(tl.where(inside, _luma(r, g, b), 0)))


@triton.jit
def jitter(pixels, out, rows, floats, row, size, GRAYSCALE_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(0)
    rows += sample * row
    floats += sample * row
    r, g, b, inside, at = _load_pixels(pixels, sample, size, BLOCK)
    if GRAYSCALE_FIRST:
        r, g, b = _grayscale_if_due(r, g, b, rows)
    for turn in range(4):
        r, g, b = _operation(r, g, b, tl.load(rows + ORDER + turn), rows, floats, size)
    if not GRAYSCALE_FIRST:
        r, g, b = _grayscale_if_due(r, g, b, rows)
    tl.store(out + at, r.to(tl.uint8), mask=inside)
    tl.store(out + at + 1, g.to(tl.uint8), mask=inside)
    tl.store(out + at + 2, b.to(tl.uint8), mask=inside)


@triton.jit
def blur_rows(pixels, out, rows, row, size, REACH: tl.constexpr, BLOCK: tl.constexpr):
    sample = tl.program_id(0)
    rows += sample * row
    if tl.load(rows + BLUR) != 0:
        value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = value < 3 * size * size
        at = sample.to(tl.int64) * (3 * size * size) + value
        blurred = _box_blurs(pixels + at, inside, value // 3 % size, 3, size, rows, REACH)
        tl.store(out + at, blurred.to(tl.uint8), mask=inside)


@triton.jit
def finish(
    pixels, blurred_rows, out, rows, threshold, scale_r, scale_g, scale_b, bias_r, bias_g, bias_b, row, size,
    BLURS: tl.constexpr, REACH: tl.constexpr, NORMALIZED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    rows += sample * row
    value = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = value < 3 * size * size
    at = sample.to(tl.int64) * (3 * size * size) + value
    if BLURS:
        if tl.load(rows + BLUR) != 0:
            x = _box_blurs(blurred_rows + at, inside, value // (3 * size), 3 * size, size, rows, REACH).to(tl.int32)
        else:
            x = tl.load(pixels + at, mask=inside, other=0).to(tl.int32)
    else:
        x = tl.load(pixels + at, mask=inside, other=0).to(tl.int32)
    if tl.load(rows + SOLARIZE) != 0:
        x = tl.where(x < threshold, x, 255 - x)
    if NORMALIZED:
        channel = value % 3
        scale = tl.where(channel == 0, scale_r, tl.where(channel == 1, scale_g, scale_b))
        bias = tl.where(channel == 0, bias_r, tl.where(channel == 1, bias_g, bias_b))
        tl.store(out + at, (x.to(tl.float32) * scale + bias).to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(out + at, x.to(tl.uint8), mask=inside)


@triton.jit
def strong_table(pixels, tables, rows, floats, start, row, size, BLOCK: tl.constexpr):
    """One program a sample: first what is known of its pixels, then the table of each channel."""
    sample = tl.program_id(0)
    rows += sample * row + start
    kind = tl.load(rows + KIND)
    if _is_table(kind):
        factor = tl.load(floats + sample * row + start + FACTOR)
        values = tl.arange(0, 256)
        mean = kind * 0
        if kind == _STRONG_CONTRAST:
            total = tl.zeros([BLOCK], dtype=tl.int64)
            for first in range(0, size * size, BLOCK):
                r, g, b, inside, _ = _load_block(pixels, sample, first, size, BLOCK)
                total += tl.where(inside, _luma(r, g, b), 0)
            mean = _rounded_mean(tl.sum(total), size)
        for channel in range(3):
            table = values
            if (kind == _STRONG_CONTRAST) | (kind == _STRONG_BRIGHTNESS):
                table = _blend(values * 0 + mean, values, factor)
            elif kind == _POSTERIZE:
                table = values & tl.load(rows + BITS)
            elif kind == _STRONG_SOLARIZE:
                table = tl.where(values < tl.load(rows + THRESHOLD), values, 255 - values)
            else:
                counts = tl.zeros([256], dtype=tl.int32)
                for first in range(0, size * size, BLOCK):
                    pixel = first + tl.arange(0, BLOCK)
                    inside = pixel < size * size
                    at = sample.to(tl.int64) * (3 * size * size) + 3 * pixel + channel
                    counts += tl.histogram(tl.load(pixels + at, mask=inside, other=0).to(tl.int32), 256, mask=inside)
                if kind == _AUTO_CONTRAST:
                    table = _stretched(values, counts)
                else:
                    table = _equalized(values, counts)
            tl.store(tables + (sample * 3 + channel) * 256 + values, table.to(tl.uint8))


@triton.jit
def strong_apply(
    pixels, tables, out, rows, floats, start, scale_r, scale_g, scale_b, bias_r, bias_g, bias_b, row, size,
    NORMALIZED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    rows += sample * row + start
    kind = tl.load(rows + KIND)
    factor = tl.load(floats + sample * row + start + FACTOR)
    r, g, b, inside, at = _load_pixels(pixels, sample, size, BLOCK)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x, y = pixel % size, pixel // size
    if _is_table(kind):
        tables += sample * 768
        r = tl.load(tables + r).to(tl.int32)
        g = tl.load(tables + 256 + g).to(tl.int32)
        b = tl.load(tables + 512 + b).to(tl.int32)
    elif kind == _STRONG_SATURATION:
        r, g, b = _saturation(r, g, b, factor)
    elif kind == _SHARPNESS:
        within = inside & (x > 0) & (x < size - 1) & (y > 0) & (y < size - 1)
        r = _sharpened(pixels + at, r, within, size, factor)
        g = _sharpened(pixels + at + 1, g, within, size, factor)
        b = _sharpened(pixels + at + 2, b, within, size, factor)
    elif _is_move(kind):
        matrix = rows + MATRIX
        from_x = (tl.load(matrix) * x + tl.load(matrix + 1) * y + tl.load(matrix + 2)) >> 16
        from_y = (tl.load(matrix + 3) * x + tl.load(matrix + 4) * y + tl.load(matrix + 5)) >> 16
        seen = inside & (from_x >= 0) & (from_x < size) & (from_y >= 0) & (from_y < size)
        shown = sample.to(tl.int64) * (3 * size * size) + 3 * (from_y * size + from_x)
        r = tl.load(pixels + shown, mask=seen, other=0).to(tl.int32)
        g = tl.load(pixels + shown + 1, mask=seen, other=0).to(tl.int32)
        b = tl.load(pixels + shown + 2, mask=seen, other=0).to(tl.int32)
    if NORMALIZED:
        of_type = out.dtype.element_ty
        tl.store(out + at, (r.to(tl.float32) * scale_r + bias_r).to(of_type), mask=inside)
        tl.store(out + at + 1, (g.to(tl.float32) * scale_g + bias_g).to(of_type), mask=inside)
        tl.store(out + at + 2, (b.to(tl.float32) * scale_b + bias_b).to(of_type), mask=inside)
    else:
        tl.store(out + at, r.to(tl.uint8), mask=inside)
        tl.store(out + at + 1, g.to(tl.uint8), mask=inside)
        tl.store(out + at + 2, b.to(tl.uint8), mask=inside)


@triton.jit
def _load_pixels(pixels, sample, size, BLOCK: tl.constexpr):
    return _load_block(pixels, sample, tl.program_id(1) * BLOCK, size, BLOCK)


@triton.jit
def _load_block(pixels, sample, first, size, BLOCK: tl.constexpr):
    """Red, green and blue as int32, which of them are of the image, and where the red ones lie."""
    pixel = first + tl.arange(0, BLOCK)
    inside = pixel < size * size
    at = sample.to(tl.int64) * (3 * size * size) + 3 * pixel
    r = tl.load(pixels + at, mask=inside, other=0).to(tl.int32)
    g = tl.load(pixels + at + 1, mask=inside, other=0).to(tl.int32)
    b = tl.load(pixels + at + 2, mask=inside, other=0).to(tl.int32)
    return r, g, b, inside, at


@triton.jit
def _operation(r, g, b, number, rows, floats, size):
    if number == BRIGHTNESS:
        factor = tl.load(floats + BRIGHTNESS_FACTOR)
        r, g, b = _blend(r * 0, r, factor), _blend(g * 0, g, factor), _blend(b * 0, b, factor)
    elif number == CONTRAST:
        factor = tl.load(floats + CONTRAST_FACTOR)
        total = tl.load(rows + _LUMA_SUM).to(tl.uint32, bitcast=True).to(tl.int64)
        mean = r * 0 + _rounded_mean(total, size)
        r, g, b = _blend(mean, r, factor), _blend(mean, g, factor), _blend(mean, b, factor)
    elif number == SATURATION:
        r, g, b = _saturation(r, g, b, tl.load(floats + SATURATION_FACTOR))
    elif number == HUE:
        r, g, b = _turn_hue(r, g, b, tl.load(rows + HUE_STEPS))
    return r, g, b


@triton.jit
def _luma(r, g, b):
    return (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16


@triton.jit
def _rounded_mean(total, size):
    """Of size * size values; half is rounded up."""
    num = size * size
    return ((2 * total + num) // (2 * num)).to(tl.int32)


@triton.jit
def _grayscale_if_due(r, g, b, rows):
    if tl.load(rows + GRAYSCALE) != 0:
        luma = _luma(r, g, b)
        r, g, b = luma, luma, luma
    return r, g, b


@triton.jit
def _blend(without, x, factor):
    """`Image.blend(without, x, factor)`, clipped and cut to whole numbers."""
    start = without.to(tl.float32)
    value = (x.to(tl.float32) - start) * factor + start
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _saturation(r, g, b, factor):
    luma = _luma(r, g, b)
    return _blend(luma, r, factor), _blend(luma, g, factor), _blend(luma, b, factor)


@triton.jit
def _turn_hue(r, g, b, steps):
    """Through Pillow's 8-bit HSV, as colour.turn_hue without its tables; float64 where rounding to float32 would show.

    colour._hue_tables names the six orders of the channels; here an order is base + sign * (how far the middle one is).
    """
    high, low = tl.maximum(tl.maximum(r, g), b), tl.minimum(tl.minimum(r, g), b)
    middle = r + g + b - high - low
    spread = high - low
    far = tl.div_rn((high - middle).to(tl.float32), tl.maximum(spread, 1).to(tl.float32))
    red_green, green_blue, blue_red = r >= g, g >= b, b >= r
    falls = (red_green & green_blue) | (green_blue & blue_red) | (blue_red & red_green)
    red_base = tl.where(green_blue, 1.0, -1.0)
    green_base = tl.where(blue_red, 3.0, 1.0)
    blue_base = tl.where(red_green, 5.0, 3.0)
    is_red = red_green & (blue_red == 0)
    is_green = green_blue & (red_green == 0)
    base = tl.where(is_red, red_base, tl.where(is_green, green_base, blue_base))
    turn = tl.where(falls, base - far, base + far).to(tl.float64) / 6.0 + 1.0
    turn = (turn - tl.floor(turn)).to(tl.float32)
    hue = tl.where(spread == 0, 0, tl.minimum(turn * 255.0, 255.0).to(tl.int32))
    hue = (hue + steps) & 255

    ratio = tl.div_rn(spread.to(tl.float32), tl.maximum(high, 1).to(tl.float32))
    saturation = tl.minimum(ratio.to(tl.float64) * 255.0, 255.0).to(tl.int32)
    chroma = tl.div_rn(saturation.to(tl.float32), 255.0) * high.to(tl.float32)
    position = tl.div_rn(hue.to(tl.float32) * 6.0, 255.0)
    sector = tl.floor(position)
    up = position - sector
    sector = sector.to(tl.int32)
    return (
        _channel(high, chroma, sector, up),
        _channel(high, chroma, sector + 4, up),
        _channel(high, chroma, sector + 2, up),
    )


@triton.jit
def _channel(high, chroma, sector, up):
    """high - chroma * gap, where the gap goes 0, up, 1, 1, down, 0 through the sectors of the colour circle."""
    sector = sector % 6
    gap = tl.where((sector == 0) | (sector == 5), 0.0, 1.0)
    gap = tl.where(sector == 1, up, tl.where(sector == 4, 1.0 - up, gap))
    return ((high.to(tl.float32) + 0.5) - gap * chroma).to(tl.int32)


@triton.jit
def _box_blurs(start, inside, place, stride, size, rows, REACH: tl.constexpr):
    """Pillow's GaussianBlur along one axis is three box blurs. `place` is that along it, pixels are `stride` apart.

    A pass needs the pass before it up to REACH further out, and beyond the image the value of the pass at its edge.
    """
    values = ()
    for by in tl.static_range(-3 * REACH, 3 * REACH + 1):
        neighbour = tl.minimum(tl.maximum(place + by, 0), size - 1) - place
        values = values + (tl.load(start + neighbour * stride, mask=inside, other=0).to(tl.uint32),)  # type: ignore[assignment]
    values = _box_pass(values, place, size, rows, 2 * REACH, REACH)
    values = _box_pass(values, place, size, rows, REACH, REACH)
    return _box_pass(values, place, size, rows, 0, REACH)[0]


@triton.jit
def _box_pass(values, place, size, rows, OUT: tl.constexpr, REACH: tl.constexpr):
    """The pass at -OUT..OUT px from `place`, from what was there up to REACH further out."""
    after = (_box_blur(values, OUT + REACH, rows, REACH),)
    for away in tl.static_range(1, OUT + 1):
        left = _box_blur(values, OUT + REACH - away, rows, REACH)
        right = _box_blur(values, OUT + REACH + away, rows, REACH)
        left = tl.where(place - away < 0, after[0], left)
        right = tl.where(place + away > size - 1, after[2 * away - 2], right)
        after = (left,) + after + (right,)  # type: ignore[assignment]
    return after


@triton.jit
def _box_blur(values, at: tl.constexpr, rows, REACH: tl.constexpr):
    """Of the values around the one at `at`, rounded as Pillow does."""
    total = values[at] * tl.load(rows + WEIGHTS).to(tl.uint32, bitcast=True)
    for away in tl.static_range(1, REACH + 1):
        weight = tl.load(rows + WEIGHTS + away).to(tl.uint32, bitcast=True)
        total += (values[at - away] + values[at + away]) * weight
    return (total + (1 << 23)) >> 24


@triton.jit
def _is_table(kind):
    of_pixels = (kind == _AUTO_CONTRAST) | (kind == _EQUALIZE) | (kind == _STRONG_CONTRAST)
    return of_pixels | (kind == _STRONG_BRIGHTNESS) | (kind == _POSTERIZE) | (kind == _STRONG_SOLARIZE)


@triton.jit
def _is_move(kind):
    shears = (kind == _SHEAR_X) | (kind == _SHEAR_Y)
    return shears | (kind == _ROTATE) | (kind == _TRANSLATE_X) | (kind == _TRANSLATE_Y)


@triton.jit
def _stretched(values, counts):
    """`ImageOps.autocontrast` of a channel with that histogram, in double precision; of one value, it stays."""
    low = tl.min(tl.where(counts > 0, values, 255))
    high = tl.max(tl.where(counts > 0, values, 0))
    scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
    stretched = values.to(tl.float64) * scale - low.to(tl.float64) * scale
    stretched = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
    return tl.where(high > low, stretched, values)


@triton.jit
def _equalized(values, counts):
    """`ImageOps.equalize` of a channel with that histogram."""
    largest = tl.max(tl.where(counts > 0, values, 0))
    step = (tl.sum(counts) - tl.sum(tl.where(values == largest, counts, 0))) // 255
    smaller = tl.cumsum(counts, 0) - counts
    equalized = tl.minimum((step // 2 + smaller) // tl.maximum(step, 1), 255)
    return tl.where(step > 0, equalized, values)


@triton.jit
def _sharpened(start, x, within, size, factor):
    """Blended with Pillow's SMOOTH, a 3 x 3 mean with five times the weight in the middle; borders stay as they are."""
    total = 4 * x
    for down in tl.static_range(-1, 2):
        for right in tl.static_range(-1, 2):
            total += tl.load(start + 3 * (down * size + right), mask=within, other=0).to(tl.int32)
    smooth = tl.where(within, (2 * total + 13) // 26, x)
    return _blend(smooth, x, factor)
