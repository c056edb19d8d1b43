"""The exact backend against torchvision on Pillow images: equal, bit for bit."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as F

from pipelines.augment import AugmentSpec
from pipelines.backends import DecodeError, Job, colour, make
from pipelines.draw import draw_view
from pipelines.views import ViewSpec, flatten
from tests.pipelines.torchvision_chain import view_of
from tests.shards import encode

MOCO_V2 = AugmentSpec(jitter_p=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, grayscale_p=0.2, blur_p=0.5)
MOCO_V1 = AugmentSpec(
    jitter_p=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4, grayscale_p=0.2, grayscale_first=True
)
SWAV = AugmentSpec(jitter_p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2, grayscale_p=0.2, blur_p=0.5)
ALL = AugmentSpec(
    jitter_p=0.9,
    brightness=1.5,
    contrast=2.0,
    saturation=3.0,
    hue=0.5,
    grayscale_p=0.3,
    blur_p=0.8,
    blur_sigma=(0.05, 8.0),
    solarize_p=0.5,
    solarize_threshold=100,
)
NO_HUE = AugmentSpec(jitter_p=1.0, brightness=0.4)  # a hue of strength 0 must not even go through HSV
CLSA = replace(MOCO_V2, strong_draws=5)
CHAINS = {
    "moco_v1": MOCO_V1,
    "moco_v2": MOCO_V2,
    "swav": SWAV,
    "clsa": CLSA,
    "all": ALL,
    "no hue": NO_HUE,
    "flip": AugmentSpec(),
}


def planes_of(images: list[Image.Image]) -> np.ndarray:
    return np.ascontiguousarray(np.stack([np.asarray(image) for image in images]).transpose(3, 0, 1, 2))


def crops_of(photos: list[Image.Image], side: int, num: int) -> list[Image.Image]:
    rng = np.random.default_rng(side)
    crops = []
    for i in range(num):
        photo = photos[i % len(photos)]
        left, top = int(rng.integers(0, photo.width - side + 1)), int(rng.integers(0, photo.height - side + 1))
        crops.append(photo.crop((left, top, left + side, top + side)))
    return crops


def every_colour(step: int) -> Image.Image:
    """A square image of all RGB colours with channels in steps of `step`, and both ends."""
    levels = np.unique(np.r_[0:256:step, 255]).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    side = int(np.ceil(np.sqrt(len(colours))))
    padded = np.concatenate([colours, np.zeros((side**2 - len(colours), 3), np.uint8)])
    return Image.fromarray(padded.reshape(side, side, 3))


FACTORS = [0.0, 0.2, 0.6, 1.0, 1.3, 1.9, 4.0]
OPERATIONS = {
    "brightness": (colour.brightness, F.adjust_brightness, FACTORS),
    "contrast": (colour.contrast, F.adjust_contrast, FACTORS),
    "saturation": (colour.saturation, F.adjust_saturation, FACTORS),
    "hue": (colour.turn_hue, F.adjust_hue, [-0.5, -0.1, -0.003, 0.0, 0.003, 0.25, 0.4, 0.5]),
    "blur": (
        colour.gaussian_blur,
        lambda image, sigma: image.filter(ImageFilter.GaussianBlur(radius=sigma)),
        [0.01, 0.1, 0.5, 1.0, 1.414, 1.42, 2.0, 3.7, 9.0],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("side", [1, 2, 5, 32, 160])
def test_an_operation_equals_torchvisions_on_photographs(name, side, photos):
    ours, theirs, values = OPERATIONS[name]
    images = crops_of(photos, side, len(values))
    factors = np.array(values, dtype=np.float32)
    expected = [theirs(image, float(factor)) for image, factor in zip(images, factors)]
    assert_array_equal(ours(planes_of(images), factors), planes_of(expected))


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_equals_torchvisions_on_all_colours(name):
    ours, theirs, values = OPERATIONS[name]
    image = every_colour(5)
    for value in np.array(values, dtype=np.float32):
        assert_array_equal(ours(planes_of([image]), value[None]), planes_of([theirs(image, float(value))]))


def test_luma_equals_pillows():
    image = every_colour(3)
    assert_array_equal(colour.luma(planes_of([image]))[0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("threshold", [0, 1, 128, 255, 256])
def test_solarize_equals_pillows(threshold):
    image = every_colour(15)
    expected = planes_of([ImageOps.solarize(image, threshold)])
    assert_array_equal(colour.solarize(planes_of([image]), threshold), expected)


@pytest.mark.slow
def test_hue_equals_torchvisions_on_all_colours_there_are():
    channel = np.arange(256, dtype=np.uint8)
    for red in range(256):
        image = Image.fromarray(np.stack(np.broadcast_arrays(np.uint8(red), channel[:, None], channel), axis=-1))
        for value in np.array([0.0, 0.3, -0.07], dtype=np.float32):
            expected = planes_of([F.adjust_hue(image, float(value))])
            assert_array_equal(colour.turn_hue(planes_of([image]), value[None]), expected)


def render(files, specs, *, threads=2, output="uint8", seed=0, epoch=0):
    """(draws, views) of all files as one batch."""
    sizes = np.array([Image.open(io.BytesIO(payload)).size for payload in files])
    draws = [
        draw_view(spec, view, seed, epoch, np.arange(len(files)), sizes[:, 0], sizes[:, 1])
        for view, spec in flatten(specs)
    ]
    backend = make("exact", specs, len(files), device="cpu", threads=threads, output=output, depth=1)
    backend.submit(Job(files, draws, [f"sample {i}" for i in range(len(files))]))
    views = backend.collect()
    backend.close()
    return draws, views


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize(("size", "num"), [(32, 61), (224, 10)])
def test_the_chain_equals_torchvisions(chain, size, num, tiny_files, photos):
    files = [payload for _, payload in tiny_files] if size == 32 else [encode(photo) for photo in photos] * 3
    files = files[:num]
    specs = [
        ViewSpec("query", size, augment=CHAINS[chain]),
        ViewSpec("local", 24, count=2, scale=(0.05, 0.3), augment=CHAINS[chain]),
    ]
    draws, views = render(files, specs)
    assert [tuple(view.shape) for view in views] == [(num, 3, size, size), (num, 3, 24, 24), (num, 3, 24, 24)]
    for (view, spec), rendered in zip(flatten(specs), views):
        assert rendered.is_contiguous(memory_format=torch.channels_last)
        for i, payload in enumerate(files):
            expected = view_of(Image.open(io.BytesIO(payload)), spec, draws[view], i)
            assert_array_equal(rendered[i].permute(1, 2, 0), np.asarray(expected), err_msg=f"view {view}, sample {i}")


@pytest.mark.parametrize("photo_size", [(64, 48), (33, 90), (41, 41), (32, 32), (32, 57), (31, 500)])
@pytest.mark.parametrize(("resize", "size"), [(32, 32), (37, 32), (40, 32), (41, 32)])
def test_a_center_view_equals_torchvisions_resize_and_center_crop(photo_size, resize, size, photos):
    image = photos[1].resize(photo_size)
    spec = ViewSpec("eval", size, crop="center", resize=resize, augment=AugmentSpec(flip_p=0.0))
    _, (view,) = render([encode(image, "png")], [spec])
    expected = transforms.Compose([transforms.Resize(resize), transforms.CenterCrop(size)])(image)
    assert_array_equal(view[0].permute(1, 2, 0), np.asarray(expected))


def test_one_view_is_one_decode(monkeypatch, tiny_files):
    opened = []
    original = Image.open
    files = [payload for _, payload in tiny_files[:6]]
    specs = [ViewSpec("query", 16, count=4, augment=MOCO_V2)]
    sizes = np.array([original(io.BytesIO(payload)).size for payload in files])
    draws = [draw_view(s, v, 0, 0, np.arange(6), sizes[:, 0], sizes[:, 1]) for v, s in flatten(specs)]
    monkeypatch.setattr(Image, "open", lambda file, **how: opened.append(1) or original(file, **how))
    backend = make("exact", specs, 6, device="cpu", threads=1, output="uint8", depth=1)
    backend.submit(Job(files, draws, [""] * 6))
    backend.collect()
    backend.close()
    assert len(opened) == 6


@pytest.mark.parametrize(("output", "tolerance"), [("float32", 1e-6), ("float16", 2e-3)])
def test_float_output_is_normalised_as_torchvision_does(output, tolerance, tiny_files):
    files = [payload for _, payload in tiny_files[:5]]
    augment = AugmentSpec(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
    spec = ViewSpec("query", 32, augment=augment)
    _, (pixels,) = render(files, [spec])
    _, (view,) = render(files, [spec], output=output)
    assert view.dtype == getattr(torch, output)
    assert view.is_contiguous(memory_format=torch.channels_last)
    expected = torch.stack([F.normalize(image.float() / 255, augment.mean, augment.std) for image in pixels])
    # float16 has 11 bits for values up to 3.5
    torch.testing.assert_close(view.float(), expected, atol=tolerance, rtol=0)


def test_pixels_do_not_depend_on_threads(tiny_files):
    files = [payload for _, payload in tiny_files]
    specs = [ViewSpec("query", 32, count=2, augment=replace(ALL, strong_draws=2))]
    _, reference = render(files, specs, threads=1)
    for threads in (2, 5, 64):
        _, views = render(files, specs, threads=threads)
        assert all(torch.equal(view, other) for view, other in zip(views, reference))


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1", "I;16", "exif"])
def test_every_colour_mode_is_what_pillows_convert_makes_of_it(mode, photos):
    photo = photos[1].resize((60, 50))
    file = io.BytesIO()
    if mode == "I;16":
        Image.fromarray((np.asarray(photo.convert("L")).astype(np.uint16) << 8) + 77).save(file, "PNG")
    elif mode == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # orientation: to be turned by a quarter; must be ignored
        photo.save(file, "JPEG", exif=exif)
    else:
        photo.convert(mode).save(file, "JPEG" if mode == "CMYK" else "PNG")
    spec = ViewSpec("query", 32)
    (draws,), (view,) = render([file.getvalue()], [spec])
    expected = view_of(Image.open(file), spec, draws, 0)
    assert_array_equal(view[0].permute(1, 2, 0), np.asarray(expected))


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (70, 1), (2, 300)])
def test_extreme_shapes_give_full_views(size, photos):
    image = photos[0].resize(size)
    specs = [
        ViewSpec("query", 32, count=2, augment=ALL),
        ViewSpec("eval", 32, crop="center", resize=36),
    ]
    draws, views = render([encode(image, "png")], specs)
    for (view, spec), rendered in zip(flatten(specs), views):
        assert_array_equal(rendered[0].permute(1, 2, 0), np.asarray(view_of(image, spec, draws[view], 0)))


def bad_files(photo: Image.Image) -> dict[str, bytes]:
    whole = encode(photo.resize((64, 64)))
    return {
        "empty": b"",
        "text": b"<html>404 Not Found</html>",
        "half": whole[: len(whole) // 2],
        "cut near the end": whole[: len(whole) - 200],
        "no tables": whole.replace(b"\xff\xdb", b"\xff\xe9"),
        "png with a wrong chunk": encode(photo.resize((64, 64)), "png")[:200] + b"\0" * 500,
    }


@pytest.mark.parametrize("kind", ["empty", "text", "half", "cut near the end", "no tables", "png with a wrong chunk"])
def test_a_bad_image_is_named_and_spares_the_next_batch(kind, photos):
    good = encode(photos[0].resize((64, 64)))
    specs = [ViewSpec("query", 32)]
    draws = [draw_view(specs[0], 0, 0, 0, np.arange(3), np.full(3, 64), np.full(3, 64))]
    names = ["a.tar:0.jpg", "a.tar:1.jpg", "b.tar:2.jpg"]
    backend = make("exact", specs, 3, device="cpu", threads=2, output="uint8", depth=2)
    backend.submit(Job([good, bad_files(photos[0])[kind], good], draws, names))
    backend.submit(Job([good] * 3, draws, names))
    with pytest.raises(DecodeError, match=r"^a\.tar:1\.jpg cannot be decoded .*--on-bad quarantine"):
        backend.collect()
    assert backend.collect()[0].shape == (3, 3, 32, 32)
    backend.close()


def test_an_index_that_promises_a_larger_image_is_refused(photos):
    specs = [ViewSpec("query", 32, scale=(0.9, 1.0))]
    draws = [draw_view(specs[0], 0, 0, 0, np.arange(1), np.full(1, 640), np.full(1, 640))]
    backend = make("exact", specs, 1, device="cpu", threads=1, output="uint8", depth=1)
    backend.submit(Job([encode(photos[0].resize((64, 64)))], draws, ["a.tar:0.jpg"]))
    with pytest.raises(DecodeError, match=r"a\.tar:0\.jpg is 64 x 64 px"):
        backend.collect()
    backend.close()


def test_jobs_come_back_in_the_order_they_were_submitted(tiny_files):
    spec = ViewSpec("eval", 32, crop="center", resize=32, augment=AugmentSpec(flip_p=0.0))
    files = [payload for _, payload in tiny_files[:8]]
    _, (expected,) = render(files, [spec])
    backend = make("exact", [spec], 2, device="cpu", threads=3, output="uint8", depth=4)
    for first in range(0, 8, 2):
        part = files[first : first + 2]
        sizes = np.array([Image.open(io.BytesIO(payload)).size for payload in part])
        backend.submit(Job(part, [draw_view(spec, 0, 0, 0, [0, 1], sizes[:, 0], sizes[:, 1])], ["", ""]))
    for first in range(0, 8, 2):
        assert torch.equal(backend.collect()[0], expected[first : first + 2])
    backend.close()


@pytest.mark.parametrize(("name", "output"), [("turbo", "uint8"), ("exact", "int8")])
def test_unknown_names_are_refused_with_the_choices(name, output):
    with pytest.raises(ValueError, match=r"loader\.(backend|output) is .* must be"):
        make(name, [ViewSpec("query", 32)], 1, device="cpu", threads=1, output=output, depth=1)
