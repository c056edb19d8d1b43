/* Baseline JPEG files, which most photographs are, to planes: the header and the layout; scan.c makes the pixels.

   The bytes are libjpeg's, by its accurate integer transform. What is unusual or doubtful is NOT_FOR_US: then libjpeg
   looks at the file (libjpeg.c). Blocks that no view shows are read, as the next ones begin where they end, but not
   transformed. */
#include <stdlib.h>
#include <string.h>

#include "baseline.h"

baseline_t *new_baseline(void) { return calloc(1, sizeof(baseline_t)); }

void free_baseline(baseline_t *b) {
    if (!b) return;
    free(b->scan.block);
    free(b);
}

/* ---- Header: 0 where something is not as expected ---- */

static int two_bytes(const uint8_t *at) { return at[0] << 8 | at[1]; }

static int read_quantization(baseline_t *b, const uint8_t *at, const uint8_t *end) {
    for (; at < end; at += 65) {
        if (end - at < 65 || at[0] > 3) return 0; /* 16-bit numbers are for 12-bit samples */
        b->quant_at[at[0]] = at + 1;
    }
    return 1;
}

static int read_codes(baseline_t *b, const uint8_t *at, const uint8_t *end) {
    while (at < end) {
        if (end - at < 17 || (at[0] & ~0x13)) return 0;
        int num = 0;
        for (int n = 1; n <= 16; n++) num += at[n];
        if (num > 256 || end - at < 17 + num) return 0;
        b->codes_at[at[0] >> 4][at[0] & 3] = at + 1;
        at += 17 + num;
    }
    return 1;
}

static int read_frame(baseline_t *b, const uint8_t *at, const uint8_t *end) {
    if (b->num_components || end - at < 6 || at[0] != 8) return 0;
    b->height = two_bytes(at + 1);
    b->width = two_bytes(at + 3);
    const int num = b->num_components = at[5];
    if (!b->height || !b->width || (num != 1 && num != 3) || end - at != 6 + 3 * num) return 0;
    at += 6;
    for (int c = 0; c < num; c++, at += 3) {
        b->component[c] = (component_t){.id = at[0], .across = at[1] >> 4, .down = at[1] & 15, .quant = at[2]};
        const int most = c || num == 1 ? 1 : 2;
        if (!at[1] || b->component[c].across > most || b->component[c].down > most || !b->component[c].across ||
            !b->component[c].down || at[2] > 3)
            return 0;
    }
    return 1;
}

static int read_scan_header(baseline_t *b, const uint8_t *at, const uint8_t *end) {
    const int num = b->num_components;
    if (!num || end - at != 4 + 2 * num || at[0] != num) return 0;
    at++;
    for (int c = 0; c < num; c++, at += 2) {
        if (at[0] != b->component[c].id || (at[1] & ~0x33)) return 0;
        b->component[c].dc = at[1] >> 4;
        b->component[c].ac = at[1] & 3;
    }
    b->scan_at = end;
    return at[0] == 0 && at[1] == 63 && at[2] == 0;
}

static int read_header(baseline_t *b, const uint8_t *file, const uint8_t *end) {
    memset(b->quant_at, 0, sizeof b->quant_at);
    memset(b->codes_at, 0, sizeof b->codes_at);
    b->num_components = b->restart_interval = b->is_jfif = 0;
    b->adobe_transform = -1;
    if (end - file < 4 || two_bytes(file) != 0xffd8) return 0;
    if (two_bytes(end - 2) != 0xffd9) return 0; /* is it cut? */
    for (const uint8_t *at = file + 2; end - at >= 4;) {
        const int marker = at[1], length = two_bytes(at + 2);
        if (at[0] != 0xff || length < 2 || end - at < 2 + length) return 0;
        const uint8_t *from = at + 4;
        at += 2 + length;
        int good = 1;
        if (marker == 0xdb) good = read_quantization(b, from, at);
        else if (marker == 0xc4) good = read_codes(b, from, at);
        else if (marker == 0xc0 || marker == 0xc1) good = read_frame(b, from, at);
        else if (marker == 0xda) return read_scan_header(b, from, at);
        else if (marker == 0xdd) {
            good = length == 4;
            if (good) b->restart_interval = two_bytes(from);
        } else if (marker == 0xe0) {
            const int is_jfif = length >= 16 && !memcmp(from, "JFIF", 5);
            good = !is_jfif || from[5] == 1; /* its version */
            b->is_jfif |= is_jfif;
        } else if (marker == 0xee) {
            if (length >= 14 && !memcmp(from, "Adobe", 5)) b->adobe_transform = from[11];
        } else good = (marker > 0xe0 && marker <= 0xef) || marker == 0xfe;
        if (!good) return 0;
    }
    return 0;
}

/* Does this file say that its three planes are YCbCr? */
static int is_ycc(const baseline_t *b) {
    if (b->is_jfif) return 1;
    if (b->adobe_transform >= 0) return b->adobe_transform == 1;
    return b->component[0].id == 1 && b->component[1].id == 2 && b->component[2].id == 3;
}

enum { MOST_DC = 11, MOST_AC = 10 }; /* bits of a value, of 8-bit samples */

/* Where a second code fits behind the first, both are taken at once. */
static void join_codes(codes_t *codes) {
    for (uint32_t i = 0; i < 1 << LOOK; i++) {
        const meaning_t one = codes->first[i], two = codes->first[i << first_bits(one) & ((1 << LOOK) - 1)];
        const int bits = first_bits(one) + first_bits(two);
        if (!one || !two || first_step(one) >= NO_CODE || first_step(two) == NO_CODE || bits > LOOK) continue;
        const int value = signed_value(i >> (LOOK - bits) & most_value(two), most_value(two));
        const int steps = first_step(one) + first_step(two);
        codes->first[i] = meaning(bits, first_bits(one), steps, first_step(one), most_value(one), value);
    }
}

static int make_codes(codes_t *codes, const uint8_t *counts, int is_ac) {
    if (!counts) return 0;
    const uint8_t *symbols = counts + 16;
    memset(codes->first, 0, sizeof codes->first);
    int code = 0, num = 0;
    for (int n = 1; n <= 16; n++, code <<= 1) {
        codes->offset[n] = num - code;
        for (int k = 0; k < counts[n - 1]; k++, num++, code++) {
            const int bits = is_ac ? symbols[num] & 15 : symbols[num], run = is_ac ? symbols[num] >> 4 : 0;
            meaning_t found = one_code(0, 0, NO_CODE);
            if (bits > 15) return 0;
            if (bits <= (is_ac ? MOST_AC : MOST_DC)) {
                if (bits || !is_ac || run == 15) found = one_code(n, bits, run + 1);
                else if (!run) found = one_code(n, 0, END_OF_BLOCK);
            }
            codes->symbol[num] = found;
            if (code >= (1 << n) - 1) return 0; /* a code of ones only is none */
            for (int rest = 0; n <= LOOK && rest < 1 << (LOOK - n); rest++)
                codes->first[(code << (LOOK - n)) + rest] = found;
        }
        codes->beyond[n] = code;
    }
    if (is_ac) join_codes(codes);
    return 1;
}

static int make_tables(baseline_t *b) {
    for (int c = 0; c < b->num_components; c++) {
        const component_t *own = &b->component[c];
        if (!b->quant_at[own->quant]) return 0;
        for (int k = 0; k < 64; k++) b->quant[c][COEFFICIENT_PLACE[k]] = b->quant_at[own->quant][k];
        if (c == 2 && (own->dc != own[-1].dc || own->ac != own[-1].ac)) return 0;
        if (c < 2 && !(make_codes(&b->codes[0][c], b->codes_at[0][own->dc], 0) &&
                       make_codes(&b->codes[1][c], b->codes_at[1][own->ac], 1)))
            return 0;
    }
    return 1;
}

/* ---- Planes ---- */

static int ceil_divide(int value, int by) { return (value + by - 1) / by; }

/* Plane sizes, memory, and which blocks matter: smooth upsampling looks one sample of a reduced plane further. */
static int lay_out(baseline_t *b, const window_t *window, int unit_rows, int unit_columns, scratch_t *planes,
                   image_t *image) {
    const component_t *luma = b->component;
    size_t first[3], total = 0;
    *image = (image_t){.meaning = b->num_components == 1 ? GRAY : YCC, .sub_x = 1, .sub_y = 1, .shrink = 1,
                       .whole_width = b->width, .whole_height = b->height};
    for (int c = 0; c < b->num_components; c++) {
        component_t *own = &b->component[c];
        const int sub_x = luma->across / own->across, sub_y = luma->down / own->down;
        image->sub_x = sub_x;
        image->sub_y = sub_y;
        image->width[c] = ceil_divide(b->width, sub_x);
        const int height = ceil_divide(b->height, sub_y), there = unit_rows * own->down * 8;
        image->height[c] = height < there ? height : there;
        own->low_x = (window->left / sub_x - 2) >> 3;
        own->low_y = (window->top / sub_y - 2) >> 3;
        own->high_x = (window->right / sub_x + 2) >> 3;
        own->high_y = (window->bottom / sub_y + 2) >> 3;
        own->pitch = image->pitch[c] = unit_columns * own->across * 8 + MARGIN;
        first[c] = total;
        total += (size_t)own->pitch * there + MARGIN;
    }
    uint8_t *memory = reserve(planes, total);
    if (!memory) return 0;
    for (int c = 0; c < b->num_components; c++) image->plane[c] = b->component[c].plane = memory + first[c];
    return 1;
}

int decode_baseline(baseline_t *b, const uint8_t *file, size_t num_bytes, const window_t *window, scratch_t *planes,
                    image_t *image) {
    const uint8_t *end = file + num_bytes;
    give_back(&b->scan);
    if (!read_header(b, file, end) || !make_tables(b)) return NOT_FOR_US;
    if (b->num_components == 3 && (!is_ycc(b) || (b->component[0].across == 2 && b->width <= 4))) return NOT_FOR_US;
    const int across = 8 * b->component[0].across, down = 8 * b->component[0].down;
    const int rows = ceil_divide(b->height, down), needed = ceil_divide(window->bottom + 4, down);
    const int unit_rows = needed < rows ? needed : rows, unit_columns = ceil_divide(b->width, across);
    if (!lay_out(b, window, unit_rows, unit_columns, planes, image)) return NO_MEMORY;
    return read_scan(b, end, unit_rows, unit_columns);
}
