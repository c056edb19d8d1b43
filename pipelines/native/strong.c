/* The strong draws of CLSA on the bytes of one view, bit for bit as Pillow makes them. What a level means for an operation
   is said in pipelines/strong.py alone; its numbers come here as a table. */
#include <string.h>

#include "kernel.h"

enum { /* places in strong.POOL */
    AUTO_CONTRAST, BRIGHTNESS, SATURATION, CONTRAST, EQUALIZE, IDENTITY, POSTERIZE, ROTATE, SHARPNESS, SHEAR_X, SHEAR_Y,
    SOLARIZE, TRANSLATE_X, TRANSLATE_Y
};
enum { LEVELS = 9, NUMBERS = 6 };

static inline int luma(int r, int g, int b) { return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16; }

/* Pillow's blend for a factor between 0 and 1 */
static inline uint8_t blend(int from, int to, float factor) {
    return (uint8_t)(int)((float)from + factor * (float)(to - from));
}

static void count_values(const canvas_t *canvas, int c, uint32_t counts[256]) {
    uint32_t four[4][256]; /* neighbours are often equal, and a counter must not wait for itself */
    memset(four, 0, sizeof four);
    for (int y = 0; y < canvas->size; y++) {
        const uint8_t *row = canvas->plane[c] + y * canvas->pitch;
        int x = 0;
        for (; x + 3 < canvas->size; x += 4)
            for (int k = 0; k < 4; k++) four[k][row[x + k]]++;
        for (; x < canvas->size; x++) four[0][row[x]]++;
    }
    for (int v = 0; v < 256; v++) counts[v] = four[0][v] + four[1][v] + four[2][v] + four[3][v];
}

static void look_up(canvas_t *canvas, int c, const uint8_t table[256]) {
    const int size = canvas->size;
    uint8_t *restrict plane = canvas->plane[c];
    for (int y = 0; y < size; y++, plane += canvas->pitch)
        for (int x = 0; x < size; x++) plane[x] = table[plane[x]];
}

static void auto_contrast(canvas_t *canvas) {
    uint32_t counts[256];
    uint8_t table[256];
    for (int c = 0; c < 3; c++) {
        count_values(canvas, c, counts);
        int low = 0, high = 255;
        while (low < 255 && !counts[low]) low++;
        while (high > 0 && !counts[high]) high--;
        if (high <= low) continue;
        const double scale = 255.0 / (high - low), offset = -low * scale;
        for (int v = 0; v < 256; v++) {
            const int value = (int)(v * scale + offset);
            table[v] = value < 0 ? 0 : value > 255 ? 255 : value;
        }
        look_up(canvas, c, table);
    }
}

static void equalize(canvas_t *canvas) {
    uint32_t counts[256];
    uint8_t table[256];
    for (int c = 0; c < 3; c++) {
        count_values(canvas, c, counts);
        int last = 255, different = 0;
        while (last > 0 && !counts[last]) last--;
        for (int v = 0; v < 256; v++) different += counts[v] > 0;
        const uint32_t step = ((uint32_t)(canvas->size * canvas->size) - counts[last]) / 255;
        if (different <= 1 || !step) continue;
        uint32_t below = step / 2;
        for (int v = 0; v < 256; v++) {
            table[v] = below / step > 255 ? 255 : below / step;
            below += counts[v];
        }
        look_up(canvas, c, table);
    }
}

static void scale(canvas_t *canvas, float factor, int from) {
    const int num = canvas->size * canvas->pitch;
    for (int c = 0; c < 3; c++) {
        uint8_t *restrict plane = canvas->plane[c];
        for (int i = 0; i < num; i++) plane[i] = blend(from, plane[i], factor);
    }
}

static int mean_luma(const canvas_t *canvas) {
    uint64_t total = 0;
    for (int y = 0; y < canvas->size; y++) {
        const ptrdiff_t row = (ptrdiff_t)y * canvas->pitch;
        const uint8_t *r = canvas->plane[0] + row, *g = canvas->plane[1] + row, *b = canvas->plane[2] + row;
        uint32_t sum = 0;
        for (int x = 0; x < canvas->size; x++) sum += luma(r[x], g[x], b[x]);
        total += sum;
    }
    return (int)((double)total / ((double)canvas->size * canvas->size) + 0.5);
}

static void saturate(canvas_t *canvas, float factor) {
    const int num = canvas->size * canvas->pitch;
    uint8_t *restrict r = canvas->plane[0], *restrict g = canvas->plane[1], *restrict b = canvas->plane[2];
    for (int i = 0; i < num; i++) {
        const int from = luma(r[i], g[i], b[i]);
        r[i] = blend(from, r[i], factor);
        g[i] = blend(from, g[i], factor);
        b[i] = blend(from, b[i], factor);
    }
}

/* Away from the image smoothed by (1 1 1, 1 5 1, 1 1 1) / 13, which leaves the border as it is. */
static void sharpen(canvas_t *canvas, float factor) {
    const int size = canvas->size, pitch = canvas->pitch;
    for (int c = 0; c < 3; c++) {
        uint8_t *plane = canvas->plane[c];
        for (int y = 1; y < size - 1; y++) {
            const uint8_t *restrict a = plane + (y - 1) * pitch, *restrict b = a + pitch, *restrict d = b + pitch;
            uint8_t *restrict out = canvas->spare + y * pitch;
            for (int x = 1; x < size - 1; x++) {
                const int sum = a[x - 1] + a[x] + a[x + 1] + b[x - 1] + b[x] * 5 + b[x + 1] + d[x - 1] + d[x] + d[x + 1];
                out[x] = blend((2 * sum + 13) / 26, b[x], factor);
            }
        }
        for (int y = 1; y < size - 1; y++) memcpy(plane + y * pitch + 1, canvas->spare + y * pitch + 1, size - 2);
    }
}

static void mask(canvas_t *canvas, int bits) {
    const uint8_t kept = (uint8_t)~((1 << (8 - bits)) - 1);
    const int num = canvas->size * canvas->pitch;
    for (int c = 0; c < 3; c++) {
        uint8_t *restrict plane = canvas->plane[c];
        for (int i = 0; i < num; i++) plane[i] &= kept;
    }
}

static void solarize(canvas_t *canvas, int threshold) {
    const int num = canvas->size * canvas->pitch;
    for (int c = 0; c < 3; c++) {
        uint8_t *restrict plane = canvas->plane[c];
        for (int i = 0; i < num; i++) plane[i] = plane[i] >= threshold ? 255 - plane[i] : plane[i];
    }
}

static inline int outside(int32_t x, int32_t y, int size) {
    return (unsigned)(x >> 16) >= (unsigned)size || (unsigned)(y >> 16) >= (unsigned)size;
}

/* Output (x, y) shows the input pixel around (a x + b y + c, d x + e y + f) of pixel centres, or black. Pillow counts in
   units of 2**-16. */
static void transform(canvas_t *canvas, const double matrix[NUMBERS]) {
    const int size = canvas->size, pitch = canvas->pitch;
    int64_t fixed[NUMBERS];
    for (int k = 0; k < NUMBERS; k++) {
        const int third = k % 3 == 2;
        const double at_centre = third ? matrix[k] + matrix[k - 2] * 0.5 + matrix[k - 1] * 0.5 : matrix[k];
        fixed[k] = (int64_t)__builtin_floor(at_centre * 65536.0 + 0.5);
    }
    const int32_t step_x = (int32_t)fixed[0], step_y = (int32_t)fixed[3];
    for (int c = 0; c < 3; c++) {
        const uint8_t *restrict plane = canvas->plane[c];
        for (int y = 0; y < size; y++) {
            const int32_t at_x = (int32_t)(fixed[2] + y * fixed[1]), at_y = (int32_t)(fixed[5] + y * fixed[4]);
            uint8_t *restrict out = canvas->spare + y * pitch;
            int first = 0, last = size; /* the columns that show the image: one stretch, as the image is convex */
            while (first < size && outside(at_x + first * step_x, at_y + first * step_y, size)) first++;
            while (last > first && outside(at_x + (last - 1) * step_x, at_y + (last - 1) * step_y, size)) last--;
            memset(out, 0, first);
            memset(out + last, 0, size - last);
            if (step_x == 65536 && step_y == 0)
                memcpy(out + first, plane + (at_y >> 16) * pitch + (at_x >> 16) + first, last - first);
            else
                for (int x = first; x < last; x++)
                    out[x] = plane[((at_y + x * step_y) >> 16) * pitch + ((at_x + x * step_x) >> 16)];
        }
        uint8_t *shown = canvas->spare;
        canvas->spare = canvas->plane[c];
        canvas->plane[c] = shown;
    }
}

void JOIN(apply_strong, FOR)(canvas_t *canvas, const view_t *view, int64_t i) {
    for (int draw = 0; draw < view->num_strong; draw++) {
        const int64_t at = i * view->num_strong + draw;
        const int operation = view->strong_operation[at];
        if (operation < 0) continue;
        const int place = (operation * LEVELS + view->strong_level[at] - 1) * 2 + (view->strong_sign[at] > 0);
        const double *numbers = view->strong_numbers + place * NUMBERS;
        switch (operation) {
        case AUTO_CONTRAST: auto_contrast(canvas); break;
        case BRIGHTNESS: scale(canvas, (float)numbers[0], 0); break;
        case SATURATION: saturate(canvas, (float)numbers[0]); break;
        case CONTRAST: scale(canvas, (float)numbers[0], mean_luma(canvas)); break;
        case EQUALIZE: equalize(canvas); break;
        case POSTERIZE: mask(canvas, (int)numbers[0]); break;
        case SHARPNESS: sharpen(canvas, (float)numbers[0]); break;
        case SOLARIZE: solarize(canvas, (int)numbers[0]); break;
        case ROTATE: case SHEAR_X: case SHEAR_Y: case TRANSLATE_X: case TRANSLATE_Y:
            transform(canvas, numbers);
        }
    }
}
