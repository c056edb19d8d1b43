/* What baseline.c and scan.c share: a baseline JPEG file, as its header describes it. Names are those of ITU-T T.81. */
#ifndef FASTSSL_BASELINE_H
#define FASTSSL_BASELINE_H

#include "kernel.h"

enum {
    LOOK = 10,                        /* bits of a table's first step; longer codes are rare */
    NO_CODE = 64, END_OF_BLOCK = 128, /* steps beyond every coefficient */
};

/* What the next bits of a scan mean, in one number: one code with the value behind it, or two that fit into LOOK bits. From
   the low end: the bits of all, and of the first; by how many coefficients all go on, and the first; the value of the first
   that has ones only, 2**n - 1 for n bits; the value of the second. */
typedef uint64_t meaning_t;
static inline meaning_t meaning(int bits, int first_bits, int steps, int first_step, int most_value, int second_value) {
    return (meaning_t)bits | (meaning_t)first_bits << 8 | (meaning_t)steps << 16 | (meaning_t)first_step << 24 |
           (meaning_t)most_value << 32 | (meaning_t)(uint16_t)second_value << 48;
}
static inline meaning_t one_code(int code_bits, int value_bits, int step) {
    const int bits = code_bits + value_bits;
    return meaning(bits, bits, step, step, (1 << value_bits) - 1, 0);
}
static inline int all_bits(meaning_t m) { return m & 255; }
static inline int first_bits(meaning_t m) { return m >> 8 & 255; }
static inline int all_steps(meaning_t m) { return m >> 16 & 255; }
static inline int first_step(meaning_t m) { return m >> 24 & 255; }
static inline int most_value(meaning_t m) { return m >> 32 & 0xffff; }
static inline int second_value(meaning_t m) { return (int16_t)(m >> 48); }

/* Values that begin with 0 are negative. */
static inline int signed_value(int raw, int most) { return 2 * raw > most ? raw : raw - most; }

typedef struct {
    meaning_t first[1 << LOOK]; /* by the next LOOK bits; 0: a longer code */
    meaning_t symbol[256];      /* in the order of their codes */
    int beyond[17], offset[17]; /* codes of n bits end before beyond[n]; code c is symbol[offset[n] + c] */
} codes_t;

typedef struct {
    int id, across, down;             /* sampling factors */
    int quant, dc, ac;                /* numbers of its tables */
    int low_x, high_x, low_y, high_y; /* blocks that are transformed */
    uint8_t *plane;
    int pitch;
} component_t;

struct baseline {
    scratch_t scan;
    const uint8_t *quant_at[4], *codes_at[2][4]; /* where the file has its tables; codes: DC, AC */
    int16_t quant[3][64];                        /* by component, where scan.c has the coefficients */
    codes_t codes[2][2];                         /* DC and AC of the first and of the other components */
    component_t component[3];
    int num_components, width, height, restart_interval, is_jfif, adobe_transform;
    const uint8_t *scan_at;
};

/* scan.c. Where the coefficients of the zigzag order lie in a block; 64: of those that no block has. A look can go beyond
   the last one by END_OF_BLOCK and 16. */
extern const uint8_t COEFFICIENT_PLACE[256];
/* The planes, of so many units (T.81: MCU), from the bytes at `scan_at`; `end`: of the file. Returns what decode_baseline
   does. */
int read_scan(baseline_t *baseline, const uint8_t *end, int unit_rows, int unit_columns);

#endif
