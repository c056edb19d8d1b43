/* Views of photographs as bytes: what the sources share, and what native/kernel.py mirrors. */
#ifndef FASTSSL_KERNEL_H
#define FASTSSL_KERNEL_H

#include <stddef.h>
#include <stdint.h>

/* What became of a sample. */
enum { DONE = 0, NOT_FOR_US = 1, OTHER_SIZE = 2, NO_MEMORY = 3 };

enum { GRAY, YCC, RGB }; /* what the planes of an image mean */

enum { MARGIN = 64 }; /* bytes behind a plane that may be read: rows are taken in registers of that size */

/* A decoded image. Crops are given in px of the whole image, which is `shrink` times as large as plane 0. Planes 1 and 2
   have 1/sub_x of the columns and 1/sub_y of the rows of plane 0; sub_x and sub_y are 1 or 2. */
typedef struct {
    const uint8_t *plane[3];
    int32_t pitch[3];                  /* bytes from row to row */
    int32_t width[3], height[3];       /* px of each plane that were decoded */
    int32_t meaning, sub_x, sub_y, shrink;
    int32_t whole_width, whole_height; /* px of the image as stored in the file */
} image_t;

/* One view of all samples of a job: numbers as pipelines/draw.py has them, one array entry a sample. */
typedef struct {
    uint8_t *pixels;                            /* out: (B, size, size, 3) */
    const int32_t *crop;                        /* (B, 4): top, left, height, width */
    const uint8_t *flip, *jitter, *grayscale, *solarize;
    const int8_t *order;                        /* (B, 4) */
    const float *brightness, *contrast, *saturation, *hue, *sigma;
    const int8_t *strong_operation, *strong_level, *strong_sign; /* (B, num_strong) */
    const double *strong_numbers; /* (operations, levels, 2 directions, 6): what strong.py has for a view of this size */
    int32_t size, resize;                       /* resize: shorter side in px before a centre crop; 0: `crop` is it */
    int32_t operations;                         /* bit n: jitter operation n has a strength above 0 */
    int32_t grayscale_first, solarize_threshold, num_strong;
} view_t;

/* libjpeg's functions, in the library that Pillow has loaded. */
typedef struct {
    void *std_error, *create, *memory_source, *read_header, *start, *read_raw, *abort, *destroy;
} libjpeg_t;

typedef struct { /* memory of one thread, which grows to what its largest image needs */
    void *block;
    size_t num_bytes;
} scratch_t;
void *reserve(scratch_t *scratch, size_t num_bytes);
void give_back(scratch_t *scratch); /* what only a very large image needed */

/* The part of an image that its views show, in px of the whole image. */
typedef struct {
    int top, left, bottom, right;
} window_t;

/* The planes of a JPEG file, in memory of `planes`; they need not be right outside of the window. Both return DONE,
   NOT_FOR_US or NO_MEMORY. */

/* baseline.c: ordinary files without faults, on processors with AVX2 */
typedef struct baseline baseline_t;
baseline_t *new_baseline(void);
void free_baseline(baseline_t *baseline);
int decode_baseline(baseline_t *baseline, const uint8_t *file, size_t num_bytes, const window_t *window, scratch_t *planes,
                    image_t *image);

/* libjpeg.c: all others. `may_shrink`: the largest of 1, 2, 4, 8 by which the image may be scaled down meanwhile */
typedef struct decoder decoder_t;
decoder_t *new_decoder(const libjpeg_t *library);
void free_decoder(decoder_t *decoder);
int decode_by_libjpeg(decoder_t *decoder, const uint8_t *file, size_t num_bytes, int last_row, int may_shrink,
                      scratch_t *planes, image_t *image);

/* The bytes of one view of one sample. views.c and strong.c are compiled once for each instruction set FOR. */
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#ifndef FOR
#define FOR plain
#endif
typedef int render_f(scratch_t *scratch, const image_t *image, const view_t *view, int64_t sample);
render_f render_plain, render_avx2, render_avx512;

typedef struct { /* the pixels of a view while it is worked on */
    uint8_t *plane[3], *spare; /* spare: as large as a plane */
    int size, pitch; /* pitch: a multiple of 32, and rows may be read and written up to it */
} canvas_t;
void JOIN(apply_strong, FOR)(canvas_t *canvas, const view_t *view, int64_t sample); /* in place */

#endif
