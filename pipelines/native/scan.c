/* The scan of a baseline JPEG file: from its bits to the blocks of the planes, for processors with AVX2. */
#include <immintrin.h>
#include <string.h>

#include "baseline.h"

enum { BEYOND = 2048 }; /* zeros behind a scan: a unit of 6 blocks takes less, so one look a unit is enough */

/* ---- Bits ---- */

typedef struct { /* the next bits of a scan, the first one highest; at least `num` are right */
    const uint8_t *next;
    uint64_t bits;
    int num;
} bits_t;

static inline void refill(bits_t *b) { /* to 56 or more */
    uint64_t word;
    memcpy(&word, b->next, sizeof word);
    b->bits |= __builtin_bswap64(word) >> b->num;
    b->next += (63 - b->num) >> 3;
    b->num |= 56;
}

static inline void drop(bits_t *b, int num) {
    b->bits <<= num;
    b->num -= num;
}

/* Apart, so that the common case has the registers: inlined, a scan takes a third longer. */
static __attribute__((noinline)) meaning_t long_code(const codes_t *codes, uint64_t bits) {
    for (int n = LOOK + 1; n <= 16; n++) {
        const int code = (int)(bits >> (64 - n));
        if (code < codes->beyond[n]) return codes->symbol[codes->offset[n] + code];
    }
    return one_code(0, 0, NO_CODE);
}

static inline meaning_t next_codes(const codes_t *codes, const bits_t *b) {
    const meaning_t found = codes->first[b->bits >> (64 - LOOK)];
    return __builtin_expect(found != 0, 1) ? found : long_code(codes, b->bits);
}

static inline int first_value(const bits_t *b, meaning_t m) {
    return signed_value((int)(b->bits >> (-first_bits(m) & 63)) & most_value(m), most_value(m));
}

/* A scan's bytes up to the next marker without what is stuffed in between them; where the marker is. */
static const uint8_t *unstuff(const uint8_t *from, const uint8_t *end, uint8_t *to, size_t *num) {
    uint8_t *const first = to;
    while (from < end) {
        const uint8_t *mark = memchr(from, 0xff, end - from);
        const size_t plain = (mark ? mark : end) - from;
        memcpy(to, from, plain);
        to += plain;
        from += plain;
        if (!mark || end - mark < 2 || mark[1]) break;
        *to++ = 0xff;
        from += 2;
    }
    *num = to - first;
    memset(to, 0, BEYOND);
    return from;
}

/* ---- Blocks ---- */

/* The inverse transform takes the rows of a block in pairs, 0 4, 2 6, 1 5, 3 7, and the numbers of a pair alternate: what
   one instruction multiplies and adds. Columns lie in the order 0 4 1 5 2 6 3 7, which saves exchanges between directions. */
#define AT(y, x) (16 * ((y) % 2 * 2 + (y) / 2 % 2) + (y) / 4 + 2 * ((x) % 4 * 2 + (x) / 4))

const uint8_t COEFFICIENT_PLACE[256] = {
    AT(0, 0), AT(0, 1), AT(1, 0), AT(2, 0), AT(1, 1), AT(0, 2), AT(0, 3), AT(1, 2), AT(2, 1), AT(3, 0), AT(4, 0),
    AT(3, 1), AT(2, 2), AT(1, 3), AT(0, 4), AT(0, 5), AT(1, 4), AT(2, 3), AT(3, 2), AT(4, 1), AT(5, 0), AT(6, 0),
    AT(5, 1), AT(4, 2), AT(3, 3), AT(2, 4), AT(1, 5), AT(0, 6), AT(0, 7), AT(1, 6), AT(2, 5), AT(3, 4), AT(4, 3),
    AT(5, 2), AT(6, 1), AT(7, 0), AT(7, 1), AT(6, 2), AT(5, 3), AT(4, 4), AT(3, 5), AT(2, 6), AT(1, 7), AT(2, 7),
    AT(3, 6), AT(4, 5), AT(5, 4), AT(6, 3), AT(7, 2), AT(7, 3), AT(6, 4), AT(5, 5), AT(4, 6), AT(3, 7), AT(4, 7),
    AT(5, 6), AT(6, 5), AT(7, 4), AT(7, 5), AT(6, 6), AT(5, 7), AT(6, 7), AT(7, 6), AT(7, 7), [64 ... 255] = 64};

typedef struct { /* the codes taken last: what they are, the bits before them, and which coefficients they end with */
    meaning_t codes;
    bits_t before;
    int first, last;
} taken_t;

/* One AC code or two; values go into `block`, unless that is NULL. Is this the last coefficient, or beyond? */
static inline int take(taken_t *t, bits_t *bits, const codes_t *codes, int16_t *block) {
    const meaning_t m = t->codes = next_codes(codes, bits);
    t->before = *bits;
    drop(bits, all_bits(m)); /* what the next look waits for; the rest is computed beside it */
    t->first = t->last + first_step(m);
    t->last += all_steps(m);
    if (block) {
        block[COEFFICIENT_PLACE[t->last]] = (int16_t)second_value(m);
        block[COEFFICIENT_PLACE[t->first]] = (int16_t)first_value(&t->before, m); /* the same place if it is one code */
    }
    return t->last >= 63;
}

/* The AC codes of a block. How many coefficients there were, with the first one; 0 for a fault. What is taken at once has
   26 bits at most, and 29 are there at the start. */
static inline int read_coefficients(bits_t *bits, const codes_t *codes, int16_t *block) {
    taken_t t = {.last = 0};
    for (;;) {
        if (take(&t, bits, codes, block)) break;
        refill(bits);
        if (take(&t, bits, codes, block)) break;
    }
    if (t.first >= 63) { /* a second code is the next block's */
        *bits = t.before;
        drop(bits, first_bits(t.codes));
        t.last = t.first;
    }
    return t.last == 63 ? 64 : t.last >= END_OF_BLOCK ? t.last - END_OF_BLOCK + 1 : 0;
}

/* The accurate transform of libjpeg: cosines in units of 2**-13, rounded between its two directions to a quarter and to
   16 bits. Numbers by output: of inputs 2 and 6; of inputs 1 5 and 3 7. */
enum { ONE = 8192 };
#define EVEN_0 10703, 4433
#define EVEN_1 4433, -10704
#define ODD_0 11363, 6437, 9633, 2260
#define ODD_1 9633, -11362, -2259, -6436
#define ODD_2 6437, 2261, -11362, 9633
#define ODD_3 2260, 9633, -6436, -11363
enum { FIRST_SHIFT = 11, LAST_SHIFT = 18, FIRST_BIAS = 1 << 10, LAST_BIAS = (1 << 17) + (128 << 18) };

static inline __m256i pair(int a, int b) {
    return _mm256_set1_epi32((int)((uint32_t)a << 16 >> 16 | (uint32_t)b << 16));
}

static inline __m256i odd(__m256i in15, __m256i in37, int a, int b, int c, int d) {
    return _mm256_add_epi32(_mm256_madd_epi16(in15, pair(a, b)), _mm256_madd_epi16(in37, pair(c, d)));
}

/* out[k] in 32 bits, of pairs of inputs */
static inline void transform_once(__m256i in04, __m256i in26, __m256i in15, __m256i in37, int bias, int shift,
                                  __m256i *out) {
    const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(in04, pair(ONE, ONE)), _mm256_set1_epi32(bias));
    const __m256i gap = _mm256_add_epi32(_mm256_madd_epi16(in04, pair(ONE, -ONE)), _mm256_set1_epi32(bias));
    const __m256i outer = _mm256_madd_epi16(in26, pair(EVEN_0)), inner = _mm256_madd_epi16(in26, pair(EVEN_1));
    const __m256i even[4] = {_mm256_add_epi32(sum, outer), _mm256_add_epi32(gap, inner), _mm256_sub_epi32(gap, inner),
                             _mm256_sub_epi32(sum, outer)};
    const __m256i odds[4] = {odd(in15, in37, ODD_0), odd(in15, in37, ODD_1), odd(in15, in37, ODD_2), odd(in15, in37, ODD_3)};
    for (int k = 0; k < 4; k++) {
        out[k] = _mm256_srai_epi32(_mm256_add_epi32(even[k], odds[k]), shift);
        out[7 - k] = _mm256_srai_epi32(_mm256_sub_epi32(even[k], odds[k]), shift);
    }
}

/* Numbers between the two directions that no image has: libjpeg's 16 bits would overflow. (The first direction gives one
   that is at least four times its largest input.) */
enum { WILD = 1 << 14 };

/* The pixels of a block, which is then empty again. `wild` gets a sign where a number is WILD or more. */
static inline void transform(int16_t *block, const int16_t *quant, uint8_t *pixels, int pitch, __m256i *wild) {
    __m256i in[4];
    for (int k = 0; k < 4; k++) {
        in[k] = _mm256_mullo_epi16(_mm256_load_si256((__m256i *)block + k), _mm256_loadu_si256((__m256i *)quant + k));
        _mm256_store_si256((__m256i *)block + k, _mm256_setzero_si256());
    }
    __m256i row[8], column[8];
    transform_once(in[0], in[1], in[2], in[3], FIRST_BIAS, FIRST_SHIFT, row);
    const __m256i y04 = _mm256_packs_epi32(row[0], row[4]), y15 = _mm256_packs_epi32(row[1], row[5]);
    const __m256i y26 = _mm256_packs_epi32(row[2], row[6]), y37 = _mm256_packs_epi32(row[3], row[7]);
    const __m256i far = _mm256_set1_epi16(WILD);
    *wild = _mm256_or_si256(*wild, _mm256_or_si256(_mm256_add_epi16(y04, far), _mm256_add_epi16(y15, far)));
    *wild = _mm256_or_si256(*wild, _mm256_or_si256(_mm256_add_epi16(y26, far), _mm256_add_epi16(y37, far)));
    /* Pairs of columns 04 and 15 in the lower half, of 26 and 37 in the upper; rows 0 to 3, and 4 to 7 */
    const __m256i a = _mm256_unpacklo_epi32(y04, y15), b = _mm256_unpacklo_epi32(y26, y37);
    const __m256i c = _mm256_unpackhi_epi32(y04, y15), d = _mm256_unpackhi_epi32(y26, y37);
    const __m256i even_top = _mm256_unpacklo_epi64(a, b), odd_top = _mm256_unpackhi_epi64(a, b);
    const __m256i even_low = _mm256_unpacklo_epi64(c, d), odd_low = _mm256_unpackhi_epi64(c, d);
    transform_once(_mm256_permute2x128_si256(even_top, even_low, 0x20), _mm256_permute2x128_si256(even_top, even_low, 0x31),
                   _mm256_permute2x128_si256(odd_top, odd_low, 0x20), _mm256_permute2x128_si256(odd_top, odd_low, 0x31),
                   LAST_BIAS, LAST_SHIFT, column);
    const __m256i by_row = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i left = _mm256_packus_epi16(_mm256_packs_epi32(column[0], column[1]), _mm256_packs_epi32(column[2], column[3]));
    const __m256i right = _mm256_packus_epi16(_mm256_packs_epi32(column[4], column[5]), _mm256_packs_epi32(column[6], column[7]));
    const __m256i l = _mm256_shuffle_epi8(left, by_row), r = _mm256_shuffle_epi8(right, by_row);
    const __m256i y0145 = _mm256_unpacklo_epi32(l, r), y2367 = _mm256_unpackhi_epi32(l, r);
    const __m128i two[4] = {_mm256_castsi256_si128(y0145), _mm256_castsi256_si128(y2367),
                            _mm256_extracti128_si256(y0145, 1), _mm256_extracti128_si256(y2367, 1)};
    for (int k = 0; k < 4; k++, pixels += 2 * (ptrdiff_t)pitch) {
        _mm_storel_epi64((__m128i *)pixels, two[k]);
        _mm_storel_epi64((__m128i *)(pixels + pitch), _mm_unpackhi_epi64(two[k], two[k]));
    }
}

static void fill(int first_coefficient, uint8_t *pixels, int pitch) { /* a block of one colour */
    const int value = ((first_coefficient + 4) >> 3) + 128;
    for (int y = 0; y < 8; y++, pixels += pitch) memset(pixels, value < 0 ? 0 : value > 255 ? 255 : value, 8);
}

/* ---- A scan ---- */

/* One block at block column x and block row y of its plane; 0 for a fault. */
static inline int read_block(bits_t *bits, const codes_t *dc, const codes_t *ac, const int16_t *quant, const component_t *own,
                             int x, int y, int *last_dc, int16_t *block, __m256i *wild) {
    refill(bits);
    const meaning_t m = next_codes(dc, bits);
    if (first_step(m) != 1) return 0;
    *last_dc += first_value(bits, m);
    drop(bits, all_bits(m));
    if (*last_dc != (int16_t)*last_dc) return 0;
    if (x < own->low_x || x > own->high_x || y < own->low_y || y > own->high_y) return read_coefficients(bits, ac, NULL);
    const int num = read_coefficients(bits, ac, block);
    uint8_t *pixels = own->plane + (size_t)y * 8 * own->pitch + (size_t)x * 8;
    if (num == 1) {
        const int first = (int16_t)(*last_dc * quant[0]);
        if (first != first % (WILD / 4)) return 0;
        fill(first, pixels, own->pitch);
    } else {
        block[0] = (int16_t)*last_dc;
        transform(block, quant, pixels, own->pitch, wild);
    }
    return num;
}

int read_scan(baseline_t *b, const uint8_t *end, int unit_rows, int unit_columns) {
    uint8_t *memory = reserve(&b->scan, (size_t)(end - b->scan_at) + BEYOND);
    if (!memory) return NO_MEMORY;
    const uint8_t *at = b->scan_at;
    size_t num_bytes = 0;
    bits_t bits = {memory, 0, 0};
    __m256i wild = _mm256_setzero_si256();
    int last_dc[3] = {0}, left = 0, restarts = 0, fault = 0;
    _Alignas(32) int16_t block[65] = {0}; /* the last one is of no place */
    for (int row = 0; row < unit_rows; row++)
        for (int column = 0; column < unit_columns; column++, left--) {
            if (left == 0) { /* the first unit, or one behind a restart marker */
                const ptrdiff_t unread = (ptrdiff_t)num_bytes * 8 - ((bits.next - memory) * 8 - bits.num);
                if (row + column > 0) {
                    if (unread < 0 || unread > 7 || end - at < 2 || at[1] != 0xd0 + (restarts++ & 7)) return NOT_FOR_US;
                    at += 2;
                }
                at = unstuff(at, end, memory, &num_bytes);
                bits = (bits_t){memory, 0, 0};
                memset(last_dc, 0, sizeof last_dc);
                left = b->restart_interval ? b->restart_interval : -1;
            }
            for (int c = 0; c < b->num_components; c++) {
                const component_t *own = &b->component[c];
                const codes_t *dc = &b->codes[0][c > 0], *ac = &b->codes[1][c > 0];
                for (int y = 0; y < own->down; y++)
                    for (int x = 0; x < own->across; x++)
                        fault |= !read_block(&bits, dc, ac, b->quant[c], own, column * own->across + x, row * own->down + y,
                                             &last_dc[c], block, &wild);
            }
            if (fault || bits.next > memory + num_bytes + sizeof bits.bits) return NOT_FOR_US;
        }
    const int all_there = (bits.next - memory) * 8 - bits.num <= (ptrdiff_t)num_bytes * 8;
    return all_there && !(_mm256_movemask_epi8(wild) & 0xaaaaaaaa) ? DONE : NOT_FOR_US;
}
