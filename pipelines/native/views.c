/* From the planes of a decoded photograph to one view: crop and resize, colour, blur, strong draws.

   Numbers are Pillow's, step by step, each rounded to bytes as it does (pipelines/backends/colour.py has the same in NumPy);
   only the resize keeps fractions where Pillow rounds between its two directions, and reads the reduced colour planes of a
   JPEG directly. It counts in whole numbers, so it gives the same on every processor. Rows are floats that hold whole
   numbers while colours are changed, bytes between the stages. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "kernel.h"

#define LANES 16 /* lengths of float rows are multiples of it */
#if defined(__FMA__)
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

/* A loop over a row, in blocks whose length the compiler knows: without tails, and without wider types than needed. */
#define EACH(x, num, block) \
    for (int x##_block = 0; x##_block < (num); x##_block += (block)) \
        for (int x = x##_block; x < x##_block + (block); x++)

typedef float *restrict row_t;
typedef const float *restrict const_row_t;

/* ---- Resize: Pillow's bilinear filter, as wide as the image is reduced ---- */

/* Weights are in units of 2**-14, and those of an output add up to one. Rows between the two directions have units of
   2**-7, so that both directions can multiply and add pairs of 16-bit numbers. */
enum { WEIGHT_BITS = 14, ROW_BITS = 7 };

typedef struct { /* output x is the sum over k < num of low(pair) * input[at] + high(pair) * input[at + 1], where pair is
                    pair[k * stride + x] and at is from[x] + 2 * k; what lies behind input `last` has no weight */
    int num, stride, last;
    int *from;
    uint32_t *pair;
    uint8_t *shuffle; /* from the inputs of four outputs to their pairs; NULL: they are too far apart */
} taps_t;

typedef struct { /* along one axis: output o shows the input around first + (o + .5) * scale; only [low, high) counts */
    double first, scale;
    int low, high, mirrored;
} axis_t;

static int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

/* Taps of one output that a filter has at most; an even number. */
static int most_taps(const axis_t *axis) { return 2 * (int)ceil(axis->scale > 1 ? axis->scale : 1) + 4; }

static size_t taps_bytes(const axis_t *axis, int size) {
    return (size_t)round_up(size, LANES) * (sizeof(int) + most_taps(axis) / 2 * sizeof(uint32_t) + 4);
}

/* Taps on a plane of half the width are those on the plane that libjpeg's smooth upsampling would make of it: a pixel is
   3/4 of its sample and 1/4 of the nearest other one; the first and last sample are their own neighbours. */
static int halve(double *weight, int *from, int num, int last) {
    const int begin = *from;
    int low = (begin - 1) >> 1, high = (begin + num) >> 1;
    low = low < 0 ? 0 : low;
    high = high > last ? last : high;
    double half[num + 2];
    memset(half, 0, sizeof half);
    for (int k = 0; k < num; k++) {
        const int at = (begin + k) >> 1, beside = (begin + k) & 1 ? at + 1 : at - 1;
        const int other = beside < 0 ? 0 : beside > last ? last : beside;
        half[(at > last ? last : at) - low] += 0.75 * weight[k];
        half[other - low] += 0.25 * weight[k];
    }
    *from = low;
    memcpy(weight, half, (high - low + 1) * sizeof *half);
    return high - low + 1;
}

/* Fills `taps` in `memory`; `from` counts from sample `origin` of a plane of `num_samples`, reduced by `sub`. */
static void make_taps(taps_t *taps, void *memory, const axis_t *axis, int size, int sub, int num_samples, int origin) {
    const double support = axis->scale > 1 ? axis->scale : 1;
    const int stride = round_up(size, LANES), most = most_taps(axis);
    *taps = (taps_t){.num = 1, .stride = stride, .last = num_samples - 1 - origin, .from = memory};
    taps->pair = (uint32_t *)(taps->from + stride);
    memset(memory, 0, taps_bytes(axis, size));
    for (int o = 0; o < size; o++) {
        const double centre = axis->first + (o + 0.5) * axis->scale;
        int from = (int)(centre - support + 0.5), to = (int)(centre + support + 0.5);
        from = from < axis->low ? axis->low : from;
        to = to > axis->high ? axis->high : to;
        from = from > axis->high - 1 ? axis->high - 1 : from;
        int num = to - from < 1 ? 1 : to - from;
        double weight[most + 2], total = 0;
        for (int k = 0; k < num; k++) {
            const double w = 1 - fabs((from + k - centre + 0.5) / support);
            total += weight[k] = w > 0 ? w : 0;
        }
        if (total <= 0) total = weight[0] = 1;
        if (sub == 2) num = halve(weight, &from, num, num_samples - 1);
        const int x = axis->mirrored ? size - 1 - o : o;
        taps->from[x] = from - origin;
        double part = 0;
        int given = 0;
        for (int k = 0; k < num; k++) { /* rounded so that nothing is lost in the sum */
            part += weight[k];
            const int upto = (int)(part / total * (1 << WEIGHT_BITS) + 0.5);
            taps->pair[k / 2 * stride + x] |= (uint32_t)(upto - given) << k % 2 * 16;
            if (upto > given && k / 2 >= taps->num) taps->num = k / 2 + 1;
            given = upto;
        }
    }
    for (int x = size; x < stride; x++) taps->from[x] = taps->from[size - 1];
}

/* mixed[x] = the taps of output row y on bytes of `num` columns; up to MARGIN - 1 more are read and written */
static void mix_rows(const uint8_t *plane, int pitch, int num, const taps_t *taps, int y, int16_t *restrict mixed) {
    enum { HALF = 1 << (WEIGHT_BITS - ROW_BITS - 1), STEP = 32 };
    for (int x = 0; x < num; x += STEP) {
#if defined(__AVX2__)
        const __m256i zero = _mm256_setzero_si256();
        __m256i a = _mm256_set1_epi32(HALF), b = a, c = a, d = a;
#else
        int32_t sum[STEP];
        for (int k = 0; k < STEP; k++) sum[k] = HALF;
#endif
        for (int k = 0; k < taps->num; k++) {
            const int at = taps->from[y] + 2 * k, first = at < taps->last ? at : taps->last;
            const uint8_t *p = plane + (ptrdiff_t)first * pitch + x, *q = at < taps->last ? p + pitch : p;
            const uint32_t pair = taps->pair[k * taps->stride + y];
#if defined(__AVX2__)
            const __m256i weights = _mm256_set1_epi32((int)pair);
            const __m256i above = _mm256_loadu_si256((const __m256i *)p), below = _mm256_loadu_si256((const __m256i *)q);
            const __m256i low = _mm256_unpacklo_epi8(above, below), high = _mm256_unpackhi_epi8(above, below);
            a = _mm256_add_epi32(a, _mm256_madd_epi16(_mm256_unpacklo_epi8(low, zero), weights));
            b = _mm256_add_epi32(b, _mm256_madd_epi16(_mm256_unpackhi_epi8(low, zero), weights));
            c = _mm256_add_epi32(c, _mm256_madd_epi16(_mm256_unpacklo_epi8(high, zero), weights));
            d = _mm256_add_epi32(d, _mm256_madd_epi16(_mm256_unpackhi_epi8(high, zero), weights));
#else
            const int w = (int)(pair & 0xffff), v = (int)(pair >> 16);
            for (int n = 0; n < STEP; n++) sum[n] += w * p[n] + v * q[n];
#endif
        }
#if defined(__AVX2__)
        enum { DOWN = WEIGHT_BITS - ROW_BITS };
        const __m256i e = _mm256_packs_epi32(_mm256_srai_epi32(a, DOWN), _mm256_srai_epi32(b, DOWN));
        const __m256i f = _mm256_packs_epi32(_mm256_srai_epi32(c, DOWN), _mm256_srai_epi32(d, DOWN));
        _mm256_storeu_si256((__m256i *)(mixed + x), _mm256_permute2x128_si256(e, f, 0x20));
        _mm256_storeu_si256((__m256i *)(mixed + x + 16), _mm256_permute2x128_si256(e, f, 0x31));
#else
        for (int n = 0; n < STEP; n++) mixed[x + n] = (int16_t)(sum[n] >> (WEIGHT_BITS - ROW_BITS));
#endif
    }
}

#if defined(__AVX2__) && !defined(__AVX512F__)
static int first_of_four(const int *from) { return from[0] < from[3] ? from[0] : from[3]; }

/* The inputs of four neighbouring outputs lie in one register of 8 numbers, if the image is reduced to the half at most. */
static void make_shuffles(taps_t *taps) {
    uint8_t *shuffle = taps->shuffle = (uint8_t *)(taps->pair + (size_t)taps->num * taps->stride);
    for (int x = 0; x < taps->stride; x++) {
        const int at = taps->from[x] - first_of_four(taps->from + x / 4 * 4);
        if (at > 6) {
            taps->shuffle = NULL;
            return;
        }
        for (int k = 0; k < 4; k++) shuffle[4 * x + k] = (uint8_t)(2 * at + k);
    }
}
#endif

/* resized[x] = the taps of output column x on a mixed row */
static void mix_columns(const int16_t *mixed, const taps_t *taps, row_t resized) {
    const int num = taps->num, stride = taps->stride;
    const float unit = 1.0f / (1 << (WEIGHT_BITS + ROW_BITS));
    for (int x = 0; x < stride; x += LANES) {
        const int *from = taps->from + x;
        const uint32_t *pair = taps->pair + x;
#if defined(__AVX512F__)
        /* Neighbouring outputs read neighbouring inputs: one or two registers hold all, and permuting beats gathering. */
        const int low = from[0] < from[LANES - 1] ? from[0] : from[LANES - 1];
        const int span = (from[0] < from[LANES - 1] ? from[LANES - 1] : from[0]) - low + 2 * num;
        const int16_t *near = mixed + low, *far = near + 32;
        const __m512i two = _mm512_set1_epi32(2 << 16 | 2);
        __m512i sum = _mm512_setzero_si512(), at = _mm512_sub_epi32(_mm512_loadu_si512(from), _mm512_set1_epi32(low));
        if (span <= 64) at = _mm512_add_epi32(_mm512_or_si512(at, _mm512_slli_epi32(at, 16)), _mm512_set1_epi32(1 << 16));
        for (int k = 0; k < num; k++, pair += stride) {
            __m512i inputs;
            if (span <= 32) inputs = _mm512_permutexvar_epi16(at, _mm512_loadu_si512(near));
            else if (span <= 64) inputs = _mm512_permutex2var_epi16(_mm512_loadu_si512(near), at, _mm512_loadu_si512(far));
            else inputs = _mm512_i32gather_epi32(at, near + 2 * k, 2);
            sum = _mm512_add_epi32(sum, _mm512_madd_epi16(inputs, _mm512_loadu_si512(pair)));
            if (span <= 64) at = _mm512_add_epi32(at, two);
        }
        _mm512_storeu_ps(resized + x, _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(unit)));
#elif defined(__AVX2__)
        for (int o = x; o < x + LANES; o += 8, from += 8, pair += 8) {
            const int16_t *left = mixed + first_of_four(from), *right = mixed + first_of_four(from + 4);
            const __m256i at = _mm256_loadu_si256((const __m256i *)from);
            __m256i sum = _mm256_setzero_si256();
            for (int k = 0; k < num; k++) {
                __m256i inputs;
                if (taps->shuffle) {
                    const __m256i both = _mm256_loadu2_m128i((const __m128i *)(right + 2 * k), (const __m128i *)(left + 2 * k));
                    inputs = _mm256_shuffle_epi8(both, _mm256_loadu_si256((const __m256i *)(taps->shuffle + 4 * o)));
                } else {
                    inputs = _mm256_i32gather_epi32((const int *)(mixed + 2 * k), at, 2);
                }
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(inputs, _mm256_loadu_si256((const __m256i *)(pair + k * stride))));
            }
            _mm256_storeu_ps(resized + o, _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(unit)));
        }
#else
        int32_t sum[LANES] = {0};
        for (int k = 0; k < num; k++)
            for (int lane = 0; lane < LANES; lane++) {
                const uint32_t weights = pair[k * stride + lane];
                const int16_t *at = mixed + from[lane] + 2 * k;
                sum[lane] += (int)(weights & 0xffff) * at[0] + (int)(weights >> 16) * at[1];
            }
        for (int lane = 0; lane < LANES; lane++) resized[x + lane] = (float)sum[lane] * unit;
#endif
    }
}

/* ---- Colour, on rows of `num` whole numbers; `num` is a multiple of LANES ---- */

static inline float to_byte(float value) {
    value = value > 0 ? value : 0;
    value = value < 255 ? value : 255;
    return (float)(int)value;
}

static inline float luma(float r, float g, float b) { /* every sum is a whole number below 2**24, so exact */
    return (float)(int)((r * 19595 + g * 38470 + b * 7471 + 32768) * (1 / 65536.0f));
}

static void round_row(row_t row, int num) {
    EACH(x, num, LANES) row[x] = to_byte(row[x] + 0.5f);
}

/* JFIF's conversion, as libjpeg does it */
static void ycc_to_rgb(row_t r, row_t g, row_t b, int num) {
    EACH(x, num, LANES) {
        const float y = r[x] + 0.5f, u = g[x] - 128, v = b[x] - 128;
        r[x] = to_byte(FMA(1.402f, v, y));
        g[x] = to_byte(FMA(-0.344136286f, u, FMA(-0.714136286f, v, y)));
        b[x] = to_byte(FMA(1.772f, u, y));
    }
}

static void grayscale(row_t r, row_t g, row_t b, int num) {
    EACH(x, num, LANES) r[x] = g[x] = b[x] = luma(r[x], g[x], b[x]);
}

static uint32_t sum_of_luma(const_row_t r, const_row_t g, const_row_t b, int num) {
    uint32_t sum = 0;
    for (int x = 0; x < num; x++) sum += (uint32_t)(int)luma(r[x], g[x], b[x]);
    return sum;
}

/* Brightness with `from` 0, contrast with the mean luma. */
static void scale(row_t r, row_t g, row_t b, int num, float factor, float from) {
    EACH(x, num, LANES) r[x] = to_byte((r[x] - from) * factor + from);
    EACH(x, num, LANES) g[x] = to_byte((g[x] - from) * factor + from);
    EACH(x, num, LANES) b[x] = to_byte((b[x] - from) * factor + from);
}

static void saturate(row_t r, row_t g, row_t b, int num, float factor) {
    EACH(x, num, LANES) {
        const float from = luma(r[x], g[x], b[x]);
        r[x] = to_byte((r[x] - from) * factor + from);
        g[x] = to_byte((g[x] - from) * factor + from);
        b[x] = to_byte((b[x] - from) * factor + from);
    }
}

/* A channel of an HSV colour, which is `value` less `chroma` times a trapezium of the hue (in sixths of the circle). */
static inline float channel(float sector, float hue, float value, float chroma) {
    float at = sector + hue;
    at = at >= 6 ? at - 6 : at;
    float gap = 4 - at;
    gap = gap < at ? gap : at;
    gap = gap < 1 ? gap : 1;
    gap = gap > 0 ? gap : 0;
    return (float)(int)(value + 0.5f - chroma * gap);
}

/* torchvision's adjust_hue on Pillow's HSV images, whose hue and saturation are bytes */
static void turn_hue(row_t r, row_t g, row_t b, int num, float fraction) {
    const float turn = (uint8_t)(int)((double)fraction * 255);
    EACH(x, num, LANES) {
        const float red = r[x], green = g[x], blue = b[x];
        float high = red > green ? red : green, low = red < green ? red : green;
        high = high > blue ? high : blue;
        low = low < blue ? low : blue;
        const float spread = high - low, per_spread = 1 / (spread > 1 ? spread : 1);
        const float from_red = (green - blue) * per_spread, from_green = (blue - red) * per_spread + 2;
        const float from_blue = (red - green) * per_spread + 4;
        float sixths = green == high ? from_green : from_blue;
        sixths = red == high ? from_red : sixths;
        sixths = sixths < 0 ? sixths + 6 : sixths;
        float hue = (float)(int)(sixths * 42.5f + 1e-4f) + turn; /* bytes: 255 is the whole circle */
        hue = hue >= 256 ? hue - 256 : hue;
        const float saturation = (float)(int)(spread * 255 / (high > 1 ? high : 1));
        const float chroma = high * saturation * (1 / 255.0f);
        float position = hue * (6 / 255.0f);
        position = position >= 6 ? position - 6 : position;
        r[x] = channel(5, position, high, chroma);
        g[x] = channel(3, position, high, chroma);
        b[x] = channel(1, position, high, chroma);
    }
}

static void to_floats(const uint8_t *restrict bytes, row_t row, int num) {
    EACH(x, num, LANES) row[x] = bytes[x];
}

static void to_bytes(const_row_t row, uint8_t *restrict bytes, int num) {
    EACH(x, num, LANES) bytes[x] = (uint8_t)(int)row[x];
}

enum { BRIGHTNESS, CONTRAST, SATURATION, HUE }; /* numbers of draw.py's `order` */

static void jitter(row_t r, row_t g, row_t b, int num, const view_t *view, int64_t i, int slot, int end, float mean) {
    for (; slot < end; slot++) {
        const int operation = view->order[4 * i + slot];
        if (!(view->operations >> operation & 1)) continue;
        if (operation == BRIGHTNESS) scale(r, g, b, num, view->brightness[i], 0);
        if (operation == CONTRAST) scale(r, g, b, num, view->contrast[i], mean);
        if (operation == SATURATION) saturate(r, g, b, num, view->saturation[i]);
        if (operation == HUE) turn_hue(r, g, b, num, view->hue[i]);
    }
}

static int slot_of_contrast(const view_t *view, int64_t i) {
    for (int slot = 0; slot < 4; slot++)
        if (view->order[4 * i + slot] == CONTRAST && view->operations >> CONTRAST & 1) return slot;
    return 4;
}

/* ---- Blur: Pillow's three box blurs along the rows, then three along the columns ---- */

typedef struct {
    int reach;          /* px to either side that count fully */
    uint32_t near, far; /* weights in units of 2**-24: of these px, and of the two beyond them */
} box_t;

static box_t box_of(float sigma) { /* the same mixture of float and double as Pillow's, see colour.py */
    const float variance = sigma * sigma / 3.0f;
    const float length = (float)sqrt(12.0 * (double)variance + 1.0);
    const float whole = (float)floor(((double)length - 1.0) / 2.0);
    float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
    part /= 6 * (variance - (whole + 1) * (whole + 1));
    box_t box = {.reach = (int)whole, .near = (uint32_t)(16777216.0f / ((whole + part) * 2 + 1))};
    box.far = (16777216u - (uint32_t)(2 * box.reach + 1) * box.near) / 2;
    return box;
}

static void blur_row(const uint8_t *const *tap, const box_t *box, uint8_t *restrict out, int num) {
    const uint32_t near = box->near, far = box->far, half = 1u << 23;
    const uint8_t *restrict a = tap[0], *restrict b = tap[1], *restrict c = tap[2];
    if (box->reach == 0) {
        EACH(x, num, 32)
            out[x] = (near * b[x] + far * (uint32_t)(a[x] + c[x]) + half) >> 24;
    } else if (box->reach == 1) {
        const uint8_t *restrict d = tap[3], *restrict e = tap[4];
        EACH(x, num, 32)
            out[x] = (near * (uint32_t)(b[x] + c[x] + d[x]) + far * (uint32_t)(a[x] + e[x]) + half) >> 24;
    } else {
        const uint8_t *restrict last = tap[2 * box->reach + 2];
        for (int x = 0; x < num; x++) {
            uint32_t inner = 0;
            for (int k = 1; k <= 2 * box->reach + 1; k++) inner += tap[k][x];
            out[x] = (near * inner + far * (uint32_t)(a[x] + last[x]) + half) >> 24;
        }
    }
}

/* `framed` has room for two rows with `box->reach + 1` px before and behind them. */
static void blur_plane(canvas_t *canvas, int c, const box_t *box, uint8_t *framed) {
    const int size = canvas->size, pitch = canvas->pitch, edge = box->reach + 1, taps = 2 * edge + 1;
    uint8_t *plane = canvas->plane[c], *const row[2] = {framed + edge, framed + pitch + 3 * edge};
    const uint8_t *tap[taps];
    for (int y = 0; y < size; y++) {
        memcpy(row[0], plane + y * pitch, size);
        for (int pass = 0; pass < 3; pass++) {
            uint8_t *from = row[pass & 1], *to = pass == 2 ? plane + y * pitch : row[~pass & 1];
            for (int k = 1; k <= edge; k++) {
                from[-k] = from[0];
                from[size - 1 + k] = from[size - 1];
            }
            for (int k = 0; k < taps; k++) tap[k] = from + k - edge;
            blur_row(tap, box, to, pitch);
        }
    }
    for (int pass = 0; pass < 3; pass++) {
        for (int y = 0; y < size; y++) {
            for (int k = 0; k < taps; k++) {
                const int at = y + k - edge;
                tap[k] = plane + (at < 0 ? 0 : at > size - 1 ? size - 1 : at) * pitch;
            }
            blur_row(tap, box, canvas->spare + y * pitch, pitch);
        }
        canvas->plane[c] = canvas->spare;
        canvas->spare = plane;
        plane = canvas->plane[c];
    }
}

/* ---- One view ---- */

static void invert_from(canvas_t *canvas, int threshold) {
    const int num = canvas->size * canvas->pitch;
    for (int c = 0; c < 3; c++) {
        uint8_t *restrict p = canvas->plane[c];
        for (int i = 0; i < num; i++) p[i] = p[i] >= threshold ? 255 - p[i] : p[i];
    }
}

static void interleave(const canvas_t *canvas, uint8_t *restrict pixels) {
    for (int y = 0; y < canvas->size; y++, pixels += 3 * canvas->size) {
        const uint8_t *restrict r = canvas->plane[0] + y * canvas->pitch;
        const uint8_t *restrict g = canvas->plane[1] + y * canvas->pitch;
        const uint8_t *restrict b = canvas->plane[2] + y * canvas->pitch;
        for (int x = 0; x < canvas->size; x++) {
            pixels[3 * x] = r[x];
            pixels[3 * x + 1] = g[x];
            pixels[3 * x + 2] = b[x];
        }
    }
}

/* Where output px lie in the decoded image, along the rows and along the columns. */
static void axes_of(const image_t *image, const view_t *view, int64_t i, axis_t *across, axis_t *down) {
    const int W = image->whole_width, H = image->whole_height;
    const int mirrored = view->flip[i] != 0;
    double shrink = image->shrink;
    if (view->resize) { /* torchvision's Resize(resize), then CenterCrop(size) */
        const int shorter = W < H ? W : H, longer = W < H ? H : W;
        const int other = (int)(view->resize * (double)longer / shorter);
        const int width = W <= H ? view->resize : other, height = W <= H ? other : view->resize;
        const double left = nearbyint((width - view->size) / 2.0), top = nearbyint((height - view->size) / 2.0);
        const double x_scale = (double)W / width, y_scale = (double)H / height;
        *across = (axis_t){left * x_scale / shrink, x_scale / shrink, 0, image->width[0], mirrored};
        *down = (axis_t){top * y_scale / shrink, y_scale / shrink, 0, image->height[0], 0};
        return;
    }
    const int32_t *crop = view->crop + 4 * i;
    const double top = crop[0] / shrink, left = crop[1] / shrink, height = crop[2] / shrink, width = crop[3] / shrink;
    const int right = (int)ceil(left + width), bottom = (int)ceil(top + height);
    *across = (axis_t){left, width / view->size, (int)left, right < image->width[0] ? right : image->width[0], mirrored};
    *down = (axis_t){top, height / view->size, (int)top, bottom < image->height[0] ? bottom : image->height[0], 0};
}

static int reduced(int value, int sub, int extra) { return sub == 1 ? value : (value >> 1) + extra; }

int JOIN(render, FOR)(scratch_t *scratch, const image_t *image, const view_t *view, int64_t i) {
    const int size = view->size, pitch = round_up(size, 32), num = round_up(size, LANES);
    axis_t across, down;
    axes_of(image, view, i, &across, &down);
    const box_t box = view->sigma[i] > 0 ? box_of(view->sigma[i]) : (box_t){0};

    /* memory: taps for plane 0 and for planes 1 and 2, a mixed row, three resized rows, planes, a spare one, a framed row */
    const size_t taps_across = taps_bytes(&across, size), taps_down = taps_bytes(&down, size);
    const size_t mixed_bytes = round_up(across.high - across.low + most_taps(&across) + 2 * MARGIN, LANES) * sizeof(int16_t);
    const size_t plane_bytes = (size_t)size * pitch + 64, framed_bytes = 2 * pitch + 4 * (box.reach + 1) + 64;
    char *memory = reserve(scratch, 2 * (taps_across + taps_down) + mixed_bytes + 3 * num * sizeof(float) + 4 * plane_bytes +
                                        framed_bytes);
    if (!memory) return NO_MEMORY;
    taps_t x_taps[2], y_taps[2];
    const int meaning = image->meaning, num_planes = meaning == GRAY ? 1 : 3;
    int from[2], width[2];
    for (int p = 0; p < (num_planes > 1 ? 2 : 1); p++) {
        const int sub_x = p ? image->sub_x : 1, sub_y = p ? image->sub_y : 1;
        from[p] = reduced(across.low, sub_x, -1) < 0 ? 0 : reduced(across.low, sub_x, -1);
        const int to = reduced(across.high, sub_x, 2);
        width[p] = (to > image->width[p] ? image->width[p] : to) - from[p];
        x_taps[p] = x_taps[0], y_taps[p] = y_taps[0];
        if (!p || sub_x == 2) make_taps(&x_taps[p], memory + p * taps_across, &across, size, sub_x, image->width[p], from[p]);
        char *below = memory + 2 * taps_across + p * taps_down;
        if (!p || sub_y == 2) make_taps(&y_taps[p], below, &down, size, sub_y, image->height[p], 0);
    }
#if defined(__AVX2__) && !defined(__AVX512F__)
    make_shuffles(&x_taps[0]);
    if (num_planes > 1) make_shuffles(&x_taps[1]);
#endif
    memory += 2 * (taps_across + taps_down);
    int16_t *mixed = (int16_t *)memory;
    memset(mixed, 0, mixed_bytes);
    float *r = (float *)(memory + mixed_bytes), *g = r + num, *b = g + num;
    canvas_t canvas = {.size = size, .pitch = pitch};
    for (int c = 0; c < 3; c++) canvas.plane[c] = (uint8_t *)(b + num) + c * plane_bytes;
    canvas.spare = canvas.plane[2] + plane_bytes;
    uint8_t *framed = canvas.spare + plane_bytes;

    const int gray = view->grayscale[i], first = gray && view->grayscale_first, later = gray && !view->grayscale_first;
    const int jittered = view->jitter[i], split = jittered ? slot_of_contrast(view, i) : 4;
    uint64_t total = 0;
    for (int y = 0; y < size; y++) {
        float *const rows[3] = {r, g, b};
        for (int c = 0; c < num_planes; c++) {
            const int p = c > 0;
            mix_rows(image->plane[c] + from[p], image->pitch[c], width[p], &y_taps[p], y, mixed);
            mix_columns(mixed, &x_taps[p], rows[c]);
        }
        if (meaning == YCC) ycc_to_rgb(r, g, b, num);
        else for (int c = 0; c < num_planes; c++) round_row(rows[c], num);
        for (int c = num_planes; c < 3; c++) memcpy(rows[c], r, num * sizeof *r);
        if (first) grayscale(r, g, b, num);
        if (jittered) jitter(r, g, b, num, view, i, 0, split, 0);
        if (split < 4) total += sum_of_luma(r, g, b, size);
        else if (later) grayscale(r, g, b, num);
        for (int c = 0; c < 3; c++) to_bytes(rows[c], canvas.plane[c] + y * pitch, num);
    }
    if (split < 4) {
        const float mean = (int)((double)total / ((double)size * size) + 0.5);
        for (int y = 0; y < size; y++) {
            float *const rows[3] = {r, g, b};
            for (int c = 0; c < 3; c++) to_floats(canvas.plane[c] + y * pitch, rows[c], num);
            jitter(r, g, b, num, view, i, split, 4, mean);
            if (later) grayscale(r, g, b, num);
            for (int c = 0; c < 3; c++) to_bytes(rows[c], canvas.plane[c] + y * pitch, num);
        }
    }
    if (view->sigma[i] > 0) {
        for (int c = 0; c < (gray ? 1 : 3); c++) blur_plane(&canvas, c, &box, framed);
        if (gray) for (int c = 1; c < 3; c++) memcpy(canvas.plane[c], canvas.plane[0], (size_t)size * pitch);
    }
    if (view->solarize[i]) invert_from(&canvas, view->solarize_threshold);
    if (view->num_strong) JOIN(apply_strong, FOR)(&canvas, view, i);
    interleave(&canvas, view->pixels + (size_t)i * size * size * 3);
    return DONE;
}
