/* JPEG files to planes, by libjpeg: no colour conversion and no upsampling here, both are part of the resize. */
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "libjpeg/jpeglib.h"

#include "kernel.h"

#define FILES_A_LIFE 64        /* decompressors keep about 2 KB of tables a file */
#define MAX_SCANS 500          /* of a progressive file; a crafted one has millions, and takes hours */

typedef struct jpeg_error_mgr *(*std_error_f)(struct jpeg_error_mgr *);
typedef void (*create_f)(j_decompress_ptr, int, size_t);
typedef void (*memory_source_f)(j_decompress_ptr, const unsigned char *, unsigned long);
typedef int (*read_header_f)(j_decompress_ptr, boolean);
typedef boolean (*start_f)(j_decompress_ptr);
typedef JDIMENSION (*read_raw_f)(j_decompress_ptr, JSAMPIMAGE, JDIMENSION);
typedef void (*end_f)(j_decompress_ptr);

struct decoder {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    struct jpeg_progress_mgr progress;
    jmp_buf on_error;
    libjpeg_t library;
    unsigned num_files;
};

static void fail(j_common_ptr jpeg) { longjmp(((decoder_t *)jpeg->client_data)->on_error, 1); }

/* A warning means damaged data: Pillow decides what that is worth. */
static void warn(j_common_ptr jpeg, int level) {
    if (level < 0) fail(jpeg);
}

static void be_silent(j_common_ptr jpeg) { (void)jpeg; }

static void watch(j_common_ptr jpeg) {
    if (((j_decompress_ptr)jpeg)->input_scan_number > MAX_SCANS) fail(jpeg);
}

/* 0 where the library has another struct than this was compiled for. */
static int create(decoder_t *d) {
    if (setjmp(d->on_error)) return 0;
    ((create_f)d->library.create)(&d->jpeg, JPEG_LIB_VERSION, sizeof d->jpeg);
    return 1;
}

decoder_t *new_decoder(const libjpeg_t *library) {
    decoder_t *d = calloc(1, sizeof *d);
    if (!d) return NULL;
    d->library = *library;
    d->jpeg.err = ((std_error_f)library->std_error)(&d->errors);
    d->errors.error_exit = fail;
    d->errors.emit_message = warn;
    d->errors.output_message = be_silent;
    d->jpeg.client_data = d;
    d->progress.progress_monitor = watch;
    if (!create(d)) {
        free(d);
        return NULL;
    }
    d->jpeg.progress = &d->progress;
    return d;
}

void free_decoder(decoder_t *d) {
    if (!d) return;
    if (!setjmp(d->on_error)) ((end_f)d->library.destroy)(&d->jpeg);
    free(d);
}

static int meaning_of(const struct jpeg_decompress_struct *jpeg) {
    if (jpeg->data_precision != 8) return -1;
    if (jpeg->num_components == 1) return jpeg->jpeg_color_space == JCS_GRAYSCALE ? GRAY : -1;
    if (jpeg->num_components != 3) return -1;
    return jpeg->jpeg_color_space == JCS_YCbCr ? YCC : jpeg->jpeg_color_space == JCS_RGB ? RGB : -1;
}

/* How much component 1 or 2 is reduced along one axis; 0 if in a way that libjpeg does not upsample smoothly. */
static int reduction(int all, int own) { return own == all ? 1 : 2 * own == all ? 2 : 0; }

static int has_end_marker(const uint8_t *file, size_t num_bytes) {
    return num_bytes > 2 && file[num_bytes - 2] == 0xff && file[num_bytes - 1] == JPEG_EOI;
}

static int read_planes(decoder_t *d, int last_row, scratch_t *planes, image_t *image) {
    struct jpeg_decompress_struct *jpeg = &d->jpeg;
    const int num = jpeg->num_components, block_rows = jpeg->max_v_samp_factor * jpeg->min_DCT_scaled_size;
    const int num_rows = last_row < (int)jpeg->output_height ? last_row : (int)jpeg->output_height;
    const size_t num_blocks = ((size_t)num_rows + block_rows - 1) / block_rows;
    size_t first[3], rows_a_block[3], total = 0;
    for (int c = 0; c < num; c++) {
        const jpeg_component_info *own = &jpeg->comp_info[c];
        const size_t block_px = own->DCT_scaled_size;
        rows_a_block[c] = own->v_samp_factor * block_px;
        image->pitch[c] = (own->width_in_blocks + own->h_samp_factor) * block_px + MARGIN;
        first[c] = total;
        total += image->pitch[c] * num_blocks * rows_a_block[c] + MARGIN;
        const int there = (int)(num_blocks * rows_a_block[c]);
        image->height[c] = image->height[c] < there ? image->height[c] : there;
    }
    uint8_t *memory = reserve(planes, total);
    if (!memory) return NO_MEMORY;
    JSAMPROW rows[3][4 * DCTSIZE];
    JSAMPARRAY arrays[3] = {rows[0], rows[1], rows[2]};
    for (int c = 0; c < num; c++) image->plane[c] = memory + first[c];
    for (size_t block = 0; block < num_blocks; block++) {
        for (int c = 0; c < num; c++)
            for (size_t row = 0; row < rows_a_block[c]; row++)
                rows[c][row] = memory + first[c] + (block * rows_a_block[c] + row) * image->pitch[c];
        if (!((read_raw_f)d->library.read_raw)(jpeg, arrays, block_rows)) return NOT_FOR_US;
    }
    return DONE;
}

/* Tables that a file lacks would be those of the file before. They live as long as the decompressor, which costs as much
   as a hundredth of an image: so it is a new one now and then only. */
static void forget_tables(decoder_t *d) {
    struct jpeg_decompress_struct *jpeg = &d->jpeg;
    if (++d->num_files % FILES_A_LIFE == 0) {
        ((end_f)d->library.destroy)(jpeg);
        ((create_f)d->library.create)(jpeg, JPEG_LIB_VERSION, sizeof *jpeg);
        jpeg->progress = &d->progress;
    }
    memset(jpeg->quant_tbl_ptrs, 0, sizeof jpeg->quant_tbl_ptrs);
    memset(jpeg->dc_huff_tbl_ptrs, 0, sizeof jpeg->dc_huff_tbl_ptrs);
    memset(jpeg->ac_huff_tbl_ptrs, 0, sizeof jpeg->ac_huff_tbl_ptrs);
}

int decode_by_libjpeg(decoder_t *d, const uint8_t *file, size_t num_bytes, int last_row, int may_shrink, scratch_t *planes,
                      image_t *image) {
    struct jpeg_decompress_struct *jpeg = &d->jpeg;
    if (setjmp(d->on_error)) {
        ((end_f)d->library.abort)(jpeg);
        return NOT_FOR_US;
    }
    if (num_bytes < 4 || file[0] != 0xff || file[1] != 0xd8) return NOT_FOR_US;
    forget_tables(d);
    ((memory_source_f)d->library.memory_source)(jpeg, file, num_bytes);
    if (((read_header_f)d->library.read_header)(jpeg, TRUE) != JPEG_HEADER_OK) fail((j_common_ptr)jpeg);
    memset(image, 0, sizeof *image);
    image->meaning = meaning_of(jpeg);
    if (image->meaning < 0) fail((j_common_ptr)jpeg);
    jpeg->raw_data_out = TRUE;
    jpeg->out_color_space = jpeg->jpeg_color_space;
    jpeg->scale_num = 1;
    jpeg->scale_denom = may_shrink;
    ((start_f)d->library.start)(jpeg);

    const jpeg_component_info *comp = jpeg->comp_info;
    image->shrink = DCTSIZE / jpeg->min_DCT_scaled_size;
    image->whole_width = jpeg->image_width;
    image->whole_height = jpeg->image_height;
    image->sub_x = image->sub_y = 1;
    for (int c = 0; c < jpeg->num_components; c++) {
        const int across = comp[c].h_samp_factor * comp[c].DCT_scaled_size;
        const int down = comp[c].v_samp_factor * comp[c].DCT_scaled_size;
        const int sub_x = reduction(jpeg->max_h_samp_factor * jpeg->min_DCT_scaled_size, across);
        const int sub_y = reduction(jpeg->max_v_samp_factor * jpeg->min_DCT_scaled_size, down);
        image->width[c] = comp[c].downsampled_width;
        image->height[c] = comp[c].downsampled_height;
        /* libjpeg repeats the samples of very narrow planes instead of interpolating them */
        const int odd = !sub_x || !sub_y || (sub_x == 2 && image->width[c] <= 2) || comp[c].v_samp_factor > 4;
        if (odd || (c == 0 && sub_x * sub_y != 1)) fail((j_common_ptr)jpeg);
        if (c == 2 && (sub_x != image->sub_x || sub_y != image->sub_y)) fail((j_common_ptr)jpeg);
        image->sub_x = sub_x;
        image->sub_y = sub_y;
    }
    /* Smooth upsampling looks one row of a reduced plane further. A file without an end is read to its end: is it cut? */
    const int needed = (last_row + image->shrink - 1) / image->shrink + 2;
    const int done = read_planes(d, has_end_marker(file, num_bytes) ? needed : (int)jpeg->output_height, planes, image);
    ((end_f)d->library.abort)(jpeg);
    return done;
}
