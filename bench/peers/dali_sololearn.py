"""DALI on the CPU with the operators that solo-learn's pre-training pipelines are made of, one decode for all views.

Differs: cubic interpolation; contrast about grey level 128 instead of the image's mean; hue as a rotation in YIQ
instead of HSV; brightness, contrast, saturation and hue always in this order; blur in a window of 23 px. An operation
with a chance is computed for every image and mixed in by a mask.
"""

import numpy as np
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator, LastBatchPolicy

from bench.peers import views
from bench.peers.measure import main
from bench.peers.views import VIEWS

BLUR_PX = 23


def uniform(low, high):
    return fn.random.uniform(range=[low, high])


def sometimes(probability, changed, image):
    chosen = fn.random.coin_flip(probability=probability, dtype=types.BOOL)
    return chosen * changed + (chosen ^ True) * image


def gray(image):
    luma = fn.color_space_conversion(image, image_type=types.RGB, output_type=types.GRAY)
    return fn.cat(luma, luma, luma, axis=2)


def make_view(image, view):
    b, c, s, h = view.jitter
    x = fn.random_resized_crop(image, size=view.size, random_area=view.scale, interp_type=types.INTERP_CUBIC)
    jittered = fn.color_twist(
        x,
        brightness=uniform(1 - b, 1 + b),
        contrast=uniform(1 - c, 1 + c),
        saturation=uniform(1 - s, 1 + s),
        hue=uniform(-360 * h, 360 * h),  # degrees
    )
    x = sometimes(views.JITTER_P, jittered, x)
    x = sometimes(views.GRAYSCALE_P, gray(x), x)
    x = sometimes(views.BLUR_P, fn.gaussian_blur(x, window_size=BLUR_PX, sigma=uniform(*views.BLUR_SIGMA)), x)
    return fn.crop_mirror_normalize(
        x,
        dtype=types.FLOAT,
        output_layout="CHW",
        mean=[255 * v for v in views.MEAN],
        std=[255 * v for v in views.STD],
        mirror=fn.random.coin_flip(probability=views.FLIP_P),
    )


@pipeline_def
def graph(folder, name):
    files, label = fn.readers.file(file_root=folder, shuffle_after_epoch=True, name="files")
    image = fn.decoders.image(files, output_type=types.RGB)
    return *(make_view(image, view) for view in VIEWS[name] for _ in range(view.count)), label


def batches(options):
    pipeline = graph(
        str(options.folder),
        options.views,
        batch_size=options.batch,
        num_threads=options.workers,
        device_id=None,
        seed=12,
    )
    names = [f"view{i}" for i in range(sum(view.count for view in VIEWS[options.views]))] + ["label"]
    iterator = DALIGenericIterator(
        [pipeline], names, reader_name="files", last_batch_policy=LastBatchPolicy.DROP, auto_reset=True
    )
    while True:
        yield from iterator


def operation(change):
    """A pipeline of one image: file bytes and parameter to pixels."""

    def run(jpeg, parameter):
        @pipeline_def(batch_size=1, num_threads=1, device_id=None)
        def one():
            return change(fn.decoders.image(fn.external_source(lambda: [jpeg]), output_type=types.RGB), parameter)

        (pixels,) = one().run()
        return np.array(pixels.at(0))

    return run


def crop(image, parameter):
    (top, left, height, width), size = parameter
    part = fn.slice(image, [top, left], [height, width], axis_names="HW")
    return fn.resize(part, size=[size, size], interp_type=types.INTERP_CUBIC)


OPERATIONS = {
    "crop_224": operation(crop),
    "crop_96": operation(crop),
    "brightness": operation(lambda image, p: fn.color_twist(image, brightness=p)),
    "contrast": operation(lambda image, p: fn.color_twist(image, contrast=p)),
    "saturation": operation(lambda image, p: fn.color_twist(image, saturation=p)),
    "hue": operation(lambda image, p: fn.color_twist(image, hue=360 * p)),
    "grayscale": operation(lambda image, p: gray(image)),
    "blur": operation(lambda image, p: fn.gaussian_blur(image, window_size=BLUR_PX, sigma=p)),
}

if __name__ == "__main__":
    main(batches, "float32 NCHW, normalised", lambda path: np.fromfile(path, np.uint8), OPERATIONS)
