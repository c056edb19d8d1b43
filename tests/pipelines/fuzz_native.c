/* Damaged JPEG files and random numbers through the kernel, to be compiled with it under sanitizers.

   fuzz LIBJPEG ROUNDS SEED FILE...   each round changes, cuts or joins bytes of a file and renders random views of it with
   every instruction set; a crash, a leak or an access out of bounds ends the program. Prints how many files the kernel's
   own decoder took and how many libjpeg. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernel.h"

typedef struct worker worker_t;
extern int best_instructions(void);
extern worker_t *new_worker(const libjpeg_t *library, int instructions, int by_libjpeg, int64_t *num_decoded);
extern void free_worker(worker_t *worker);
extern void render_files(worker_t *, const uint8_t *const *, const int64_t *, int64_t, int64_t, const view_t *, int, int, int32_t *);
extern int render_pixels(worker_t *, const uint8_t *, int, int, int64_t, const view_t *, int);

enum { VIEWS = 3, STRONG = 2, OPERATIONS = 14, LEVELS = 9 };

static uint64_t state;
static uint32_t any(uint32_t below) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return (uint32_t)((state * 2685821657736338717ull) >> 33) % below;
}
static float part(void) { return any(1 << 20) / (float)(1 << 20); }

static void sizes(const uint8_t *file, size_t num_bytes, int *width, int *height) {
    for (size_t at = 2; at + 9 < num_bytes && file[at] == 0xff; at += 2 + (file[at + 2] << 8 | file[at + 3]))
        if (file[at + 1] >= 0xc0 && file[at + 1] <= 0xc2) {
            const int rows = file[at + 5] << 8 | file[at + 6], columns = file[at + 7] << 8 | file[at + 8];
            if (rows && columns) *height = rows, *width = columns;
            return;
        }
}

int main(int num, char **words) {
    static const char *const names[] = {"jpeg_std_error",        "jpeg_CreateDecompress", "jpeg_mem_src",
                                        "jpeg_read_header",      "jpeg_start_decompress", "jpeg_read_raw_data",
                                        "jpeg_abort_decompress", "jpeg_destroy_decompress"};
    if (num < 5) return 2;
    void *handle = dlopen(words[1], RTLD_NOW), *functions[8];
    if (!handle) return fprintf(stderr, "%s\n", dlerror()), 2;
    for (int i = 0; i < 8; i++) functions[i] = dlsym(handle, names[i]);
    libjpeg_t library;
    memcpy(&library, functions, sizeof library);
    state = strtoull(words[3], NULL, 10) * 2 + 1;
    worker_t *workers[4]; /* the last one decodes by libjpeg alone */
    int64_t num_decoded[2] = {0};
    const int num_workers = best_instructions() + 2;
    for (int i = 0; i < num_workers; i++)
        workers[i] = new_worker(&library, i < num_workers - 1 ? i : i - 1, i == num_workers - 1, num_decoded);
    for (long round = 0, rounds = atol(words[2]); round < rounds; round++) {
        FILE *source = fopen(words[4 + any(num - 4)], "rb");
        fseek(source, 0, SEEK_END);
        size_t num_bytes = ftell(source);
        rewind(source);
        uint8_t *file = malloc(num_bytes);
        if (fread(file, 1, num_bytes, source) != num_bytes) return 2;
        fclose(source);
        int width = 1, height = 1;
        sizes(file, num_bytes, &width, &height);
        if (any(8)) { /* one file in eight stays whole */
            for (uint32_t k = any(8); k; k--) file[any(any(2) ? num_bytes : num_bytes < 700 ? num_bytes : 700)] = any(256);
            if (!any(4)) num_bytes = 1 + any(num_bytes);
            if (!any(3)) sizes(file, num_bytes, &width, &height); /* else the index says what it was */
        }
        file = realloc(file, num_bytes); /* so that a read behind the end is seen */

        int32_t crop[VIEWS][4];
        uint8_t flags[VIEWS][4];
        int8_t order[VIEWS][4], strong[VIEWS][3][STRONG];
        float factors[VIEWS][5];
        static double numbers[OPERATIONS * LEVELS * 2 * 6];
        for (int k = 0; k < OPERATIONS * LEVELS * 2; k++) { /* as pipelines/backends/native.py makes them, or wilder */
            const int operation = k / (LEVELS * 2);
            for (int n = 0; n < 6; n++) numbers[6 * k + n] = (part() - 0.5) * (n % 3 == 2 ? 600 : 3);
            if (operation <= 3 || operation == 8) numbers[6 * k] = part();
            if (operation == 6) numbers[6 * k] = any(9);
            if (operation == 11) numbers[6 * k] = any(257);
        }
        view_t views[VIEWS];
        for (int v = 0; v < VIEWS; v++) {
            const int size = 1 + any(any(4) ? 64 : 300);
            crop[v][2] = 1 + any(height), crop[v][3] = 1 + any(width);
            crop[v][0] = any(height - crop[v][2] + 1), crop[v][1] = any(width - crop[v][3] + 1);
            for (int k = 0; k < 4; k++) flags[v][k] = any(2), order[v][k] = k;
            for (int k = 3; k > 0; k--) {
                const int other = any(k + 1);
                const int8_t kept = order[v][k];
                order[v][k] = order[v][other], order[v][other] = kept;
            }
            for (int k = 0; k < 3; k++) factors[v][k] = part() * 4;
            factors[v][3] = part() - 0.5f, factors[v][4] = any(2) ? part() * (any(4) ? 2 : 60) : 0;
            for (int k = 0; k < STRONG; k++) {
                strong[v][0][k] = (int)any(OPERATIONS + 1) - 1, strong[v][1][k] = 1 + any(LEVELS), strong[v][2][k] = any(2) * 2 - 1;
            }
            views[v] = (view_t){
                .pixels = malloc((size_t)size * size * 3), .crop = crop[v], .flip = &flags[v][0], .jitter = &flags[v][1],
                .grayscale = &flags[v][2], .solarize = &flags[v][3], .order = order[v], .brightness = &factors[v][0],
                .contrast = &factors[v][1], .saturation = &factors[v][2], .hue = &factors[v][3], .sigma = &factors[v][4],
                .strong_operation = strong[v][0], .strong_level = strong[v][1], .strong_sign = strong[v][2],
                .strong_numbers = numbers, .size = size, .resize = any(4) ? 0 : size + any(9), .operations = any(16),
                .grayscale_first = any(2), .solarize_threshold = any(257), .num_strong = any(2) * STRONG};
            if (views[v].resize) crop[v][0] = crop[v][1] = 0, crop[v][2] = height, crop[v][3] = width;
        }
        const uint8_t *files[1] = {file};
        const int64_t lengths[1] = {(int64_t)num_bytes};
        const int scaled = any(2);
        for (int i = 0; i < num_workers; i++) {
            int32_t done[1] = {-1};
            render_files(workers[i], files, lengths, 0, 1, views, VIEWS, scaled, done);
            if (done[0] < DONE || done[0] > NO_MEMORY) return 3;
        }
        if (!any(8) && (long)width * height < 1 << 20) {
            uint8_t *planes = calloc((size_t)width * height * 3 + MARGIN, 1);
            render_pixels(workers[0], planes, width, height, 0, views, VIEWS);
            free(planes);
        }
        for (int v = 0; v < VIEWS; v++) free(views[v].pixels);
        free(file);
    }
    for (int i = 0; i < num_workers; i++) free_worker(workers[i]);
    printf("%ld %ld\n", (long)num_decoded[0], (long)num_decoded[1]);
    return 0;
}
