/* What Python calls: a piece of a job by one thread. */
#include <limits.h>
#include <stdlib.h>

#include "kernel.h"

#define API __attribute__((visibility("default")))

#define KEPT_BYTES (64u << 20) /* a larger buffer is given back after the image that needed it */

typedef struct { /* one a thread */
    baseline_t *baseline; /* NULL: all files are libjpeg's */
    decoder_t *decoder;
    int64_t *num_decoded; /* by baseline.c, by libjpeg */
    scratch_t planes, memory; /* of the decoded image, of a view */
    render_f *render;
} worker_t;

#ifdef __SANITIZE_ADDRESS__
enum { EXACT = 1 }; /* so that the first byte behind what was asked for is watched */
#else
enum { EXACT = 0 };
#endif

void *reserve(scratch_t *scratch, size_t num_bytes) {
    if (num_bytes > scratch->num_bytes || EXACT) {
        free(scratch->block);
        scratch->num_bytes = EXACT ? num_bytes : num_bytes + num_bytes / 4; /* ever larger images ask less often */
        scratch->block = malloc(scratch->num_bytes);
        if (!scratch->block) scratch->num_bytes = 0;
    }
    return scratch->block;
}

void give_back(scratch_t *scratch) {
    if (scratch->num_bytes <= KEPT_BYTES) return;
    free(scratch->block);
    *scratch = (scratch_t){0};
}

/* So that the mirror of these structs in Python can be held to them, and this library to its source. */
API int size_of_view(void) { return (int)sizeof(view_t); }
API const char *source_digest(void) { return SOURCE_DIGEST; }

/* The best instruction set that this processor has: 0 plain, 1 AVX2, 2 AVX-512. */
API int best_instructions(void) {
#if defined(HAVE_AVX)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) return 1;
#endif
    return 0;
}

API void free_worker(worker_t *worker) {
    if (!worker) return;
#if defined(HAVE_AVX)
    free_baseline(worker->baseline);
#endif
    free_decoder(worker->decoder);
    free(worker->planes.block);
    free(worker->memory.block);
    free(worker);
}

/* NULL where memory is short or the library's structs are not those that this was compiled for. `by_libjpeg`: it decodes
   all files. `num_decoded`: two counters. */
API worker_t *new_worker(const libjpeg_t *library, int instructions, int by_libjpeg, int64_t *num_decoded) {
    worker_t *worker = calloc(1, sizeof *worker);
    if (!worker) return NULL;
    worker->num_decoded = num_decoded;
    worker->render = render_plain;
    worker->decoder = new_decoder(library);
    int good = worker->decoder != NULL;
#if defined(HAVE_AVX)
    if (instructions == 1) worker->render = render_avx2;
    if (instructions == 2) worker->render = render_avx512;
    if (instructions > 0 && !by_libjpeg) good &= (worker->baseline = new_baseline()) != NULL;
#else
    (void)instructions, (void)by_libjpeg;
#endif
    if (good) return worker;
    free_worker(worker);
    return NULL;
}

static int least(int a, int b) { return a < b ? a : b; }
static int most(int a, int b) { return a > b ? a : b; }

/* What of an image its views show, and by how much it may be scaled down and still be no smaller than they. */
static window_t needs_of(const view_t *views, int num_views, int64_t i, int *may_shrink) {
    window_t all = {INT_MAX, INT_MAX, 0, 0};
    *may_shrink = 8;
    for (int v = 0; v < num_views; v++) {
        const int32_t *crop = views[v].crop + 4 * i; /* of a centre view: the whole image */
        all.top = least(all.top, crop[0]);
        all.left = least(all.left, crop[1]);
        all.bottom = most(all.bottom, crop[0] + crop[2]);
        all.right = most(all.right, crop[1] + crop[3]);
        const int side = views[v].resize ? views[v].resize : views[v].size;
        while (*may_shrink > 1 && least(crop[2], crop[3]) < *may_shrink * side) *may_shrink /= 2;
    }
    return all;
}

static int fits(const image_t *image, const view_t *views, int num_views, int64_t i) {
    for (int v = 0; v < num_views; v++) {
        const int32_t *crop = views[v].crop + 4 * i;
        if (!views[v].resize && (crop[0] + crop[2] > image->whole_height || crop[1] + crop[3] > image->whole_width)) return 0;
    }
    return 1;
}

static int render_all(worker_t *worker, const image_t *image, const view_t *views, int num_views, int64_t i) {
    if (!fits(image, views, num_views, i)) return OTHER_SIZE;
    for (int v = 0; v < num_views; v++) {
        const int done = worker->render(&worker->memory, image, &views[v], i);
        if (done != DONE) return done;
    }
    return DONE;
}

static int decode(worker_t *worker, const uint8_t *file, size_t num_bytes, const window_t *window, int may_shrink,
                  image_t *image) {
    scratch_t *planes = &worker->planes;
    int done = NOT_FOR_US;
    give_back(planes);
#if defined(HAVE_AVX)
    if (worker->baseline && may_shrink == 1) done = decode_baseline(worker->baseline, file, num_bytes, window, planes, image);
    worker->num_decoded[0] += done == DONE;
#endif
    if (done != NOT_FOR_US) return done;
    done = decode_by_libjpeg(worker->decoder, file, num_bytes, window->bottom, may_shrink, planes, image);
    worker->num_decoded[1] += done == DONE;
    return done;
}

/* All views of samples [begin, end) of JPEG files; `done` gets what became of each. */
API void render_files(worker_t *worker, const uint8_t *const *files, const int64_t *num_bytes, int64_t begin, int64_t end,
                  const view_t *views, int num_views, int scaled, int32_t *done) {
    for (int64_t i = begin; i < end; i++) {
        image_t image;
        int may_shrink;
        const window_t window = needs_of(views, num_views, i, &may_shrink);
        done[i] = decode(worker, files[i], num_bytes[i], &window, scaled ? may_shrink : 1, &image);
        if (done[i] == DONE) done[i] = render_all(worker, &image, views, num_views, i);
    }
}

/* All views of sample `i`, whose image somebody else decoded to bytes (3, height, width) with MARGIN bytes behind them. */
API int render_pixels(worker_t *worker, const uint8_t *planes, int width, int height, int64_t i, const view_t *views,
                  int num_views) {
    image_t image = {.meaning = RGB, .sub_x = 1, .sub_y = 1, .shrink = 1, .whole_width = width, .whole_height = height};
    for (int c = 0; c < 3; c++) {
        image.plane[c] = planes + (size_t)c * width * height;
        image.pitch[c] = image.width[c] = width;
        image.height[c] = height;
    }
    return render_all(worker, &image, views, num_views, i);
}
