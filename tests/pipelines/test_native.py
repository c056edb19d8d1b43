"""The native backend: Pillow's bytes after the resize, every JPEG layout, damaged files, threads and buffers."""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image

from pipelines import strong
from pipelines.augment import AugmentSpec
from pipelines.backends import DecodeError, Job, chosen, make, native, pillow
from pipelines.native import build, kernel
from pipelines.views import ViewSpec
from tests.pipelines.jobs import CLSA, MOCO_V1, MOCO_V2, SWAV, job_of, render, strong_job
from tests.shards import encode

NOTHING = AugmentSpec(flip_p=0.0)
BEST = kernel.INSTRUCTIONS.index(kernel.Kernel().instructions)
SETS = kernel.INSTRUCTIONS[: BEST + 1]


@pytest.fixture
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel uses this instruction set."""
    original = kernel.Kernel
    monkeypatch.setattr(kernel, "Kernel", lambda: original(instructions=request.param))
    return request.param


def only(size: int = 40, **options: Any) -> ViewSpec:
    """One operation on a whole image of that size: the crop and the resize change nothing."""
    return ViewSpec("a", size, crop="center", resize=size, augment=replace(NOTHING, **options))


def patches(photos: list[Image.Image], size: int, num: int = 24) -> list[bytes]:
    rng = np.random.default_rng(size)
    files = []
    for i in range(num):
        photo = photos[i % len(photos)]
        left, top = int(rng.integers(0, photo.width - size)), int(rng.integers(0, photo.height - size))
        files.append(encode(photo.crop((left, top, left + size, top + size)), "png"))
    return files


def differences(specs: list[ViewSpec], job: Job) -> list[np.ndarray]:
    ours, exact = render(specs, job, "native"), render(specs, job, "exact")
    return [np.abs(a.numpy().astype(int) - b.numpy()) for a, b in zip(ours, exact)]


OPERATIONS = {
    "nothing": {},
    "flip": {"flip_p": 1.0},
    "brightness": {"jitter_p": 1.0, "brightness": 1.5},
    "contrast": {"jitter_p": 1.0, "contrast": 2.0},
    "saturation": {"jitter_p": 1.0, "saturation": 3.0},
    "three of the jitter": {"jitter_p": 0.8, "brightness": 0.8, "contrast": 0.8, "saturation": 0.8},
    "grayscale": {"grayscale_p": 0.5},
    "grayscale first": {"grayscale_p": 0.5, "grayscale_first": True, "jitter_p": 1.0, "brightness": 0.4},
    "blur": {"blur_p": 0.8},
    "wide blur": {"blur_p": 1.0, "blur_sigma": (2.0, 40.0)},
    "solarize": {"solarize_p": 0.5, "solarize_threshold": 100},
    "five strong draws": {"strong_draws": 5},
}


@pytest.mark.parametrize("instructions", SETS, indirect=True)
@pytest.mark.parametrize("size", [7, 40, 65])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_pillows_bytes(name: str, size: int, instructions: str, photos: list[Image.Image]) -> None:
    specs = [only(size, **OPERATIONS[name])]
    (difference,) = differences(specs, job_of(specs, patches(photos, size)))
    assert difference.max() == 0


@pytest.mark.parametrize("instructions", SETS, indirect=True)
@pytest.mark.parametrize("name", strong.POOL)
def test_a_strong_operation_gives_pillows_bytes_at_every_level(
    name: str, instructions: str, photos: list[Image.Image]
) -> None:
    spec = only(48, strong_draws=1)
    (difference,) = differences([spec], strong_job(spec, patches(photos, 48), name))
    assert difference.max() == 0


@pytest.mark.parametrize("name", strong.POOL)
def test_images_of_one_colour_keep_to_pillow_under_strong_draws(name: str) -> None:
    """No channel has a range that could be stretched, no histogram that could be equalized."""
    colours = [(0, 0, 0), (255, 255, 255), (0, 255, 77), (130, 129, 128)]
    spec = only(32, strong_draws=1)
    job = strong_job(spec, [encode(Image.new("RGB", (32, 32), colour), "png") for colour in colours], name)
    (difference,) = differences([spec], job)
    assert difference.max() == 0


@pytest.mark.parametrize("instructions", SETS, indirect=True)
def test_a_turn_of_the_hue_differs_in_rare_pixels_only(instructions: str, photos: list[Image.Image]) -> None:
    specs = [only(64, jitter_p=1.0, hue=0.5)]
    (difference,) = differences(specs, job_of(specs, patches(photos, 64)))
    assert (difference > 0).mean() < 0.01
    assert difference.mean() < 0.02


# name: (view, bound of the mean absolute difference in grey levels)
VIEWS = {
    "crop": (ViewSpec("a", 96, augment=NOTHING), 0.3),
    "small crop": (ViewSpec("a", 48, scale=(0.02, 0.1), augment=NOTHING), 0.3),
    "enlarged": (ViewSpec("a", 224, scale=(0.02, 0.05), augment=NOTHING), 0.3),
    "much reduced": (ViewSpec("a", 9, augment=NOTHING), 0.3),
    "center": (ViewSpec("a", 96, crop="center", resize=109, augment=NOTHING), 0.3),
    "moco_v1": (ViewSpec("a", 224, augment=MOCO_V1), 0.4),
    "moco_v2": (ViewSpec("a", 224, augment=MOCO_V2), 0.35),
    "swav": (ViewSpec("a", 96, scale=(0.05, 0.14), augment=SWAV), 0.35),
    "clsa": (ViewSpec("a", 96, augment=CLSA), 0.5),
}


@pytest.fixture(scope="module")
def jpegs(photos: list[Image.Image]) -> list[bytes]:
    """JPEG files of odd and even sizes with every common reduction of the colour planes, some progressive or gray."""
    rng = np.random.default_rng(5)
    files = []
    for i in range(24):
        photo = photos[i % len(photos)]
        width, height = rng.integers(150, 290, 2).tolist()
        patch = photo.crop((10, 5, 10 + width, 5 + height))
        file = io.BytesIO()
        image = patch.convert("L") if i % 12 == 7 else patch
        image.save(file, "JPEG", quality=92, subsampling=i % 3, progressive=i % 5 == 4)
        files.append(file.getvalue())
    return files


@pytest.mark.parametrize("instructions", SETS, indirect=True)
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_as_near_to_exact_as_stated(name: str, instructions: str, jpegs: list[bytes]) -> None:
    spec, bound = VIEWS[name]
    (difference,) = differences([spec], job_of([spec], jpegs))
    assert difference.mean() < bound
    assert difference.mean(axis=(1, 2, 3)).max() < 4 * bound


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **({"quality": 92} | options))
    return file.getvalue()


def sampled(image: Image.Image, subsampling: int, across: int, down: int) -> bytes:
    """A layout that Pillow does not write: the header of another one is told these factors of the first plane. As many
    blocks make a unit as before, so the file is whole, though its blocks lie elsewhere."""
    width, height = image.width // 16 * 16, image.height // 16 * 16
    file = bytearray(jpeg(image.crop((0, 0, width, height)), subsampling=subsampling))
    at = file.index(b"\xff\xc0") + 5
    before = file[at + 6] >> 4, file[at + 6] & 15
    assert before[0] * before[1] == across * down
    file[at : at + 2] = (height * down // before[1]).to_bytes(2, "big")
    file[at + 2 : at + 4] = (width * across // before[0]).to_bytes(2, "big")
    file[at + 6] = across << 4 | down
    return bytes(file)


LAYOUTS: dict[str, tuple[Callable[[Image.Image], bytes], bool]] = {  # name: (writer, is it taken directly?)
    "4:4:4": (lambda image: jpeg(image, subsampling=0), True),
    "4:2:2": (lambda image: jpeg(image, subsampling=1), True),
    "4:2:0": (lambda image: jpeg(image, subsampling=2), True),
    "progressive": (lambda image: jpeg(image, progressive=True), True),
    "restart markers": (lambda image: jpeg(image, restart_marker_blocks=3), True),
    "gray": (lambda image: jpeg(image.convert("L")), True),
    "RGB": (lambda image: jpeg(image, keep_rgb=True), True),
    "4:4:0": (lambda image: sampled(image, 1, 1, 2), True),
    "4:1:1": (lambda image: sampled(image, 2, 4, 1), False),
    "CMYK": (lambda image: jpeg(image.convert("CMYK")), False),
    "PNG": (lambda image: encode(image, "png"), False),
    "PNG with a palette": (lambda image: encode(image.quantize(16), "png"), False),
    "BMP": (lambda image: encode(image, "bmp"), False),
}


@pytest.fixture
def by_pillow(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places in the job of the samples that Pillow decodes."""
    seen: list[int] = []
    original = pillow.decode
    monkeypatch.setattr(pillow, "decode", lambda job, i: seen.append(i) or original(job, i))
    return seen


@pytest.mark.parametrize("size", [(160, 128), (67, 93), (9, 8), (5, 5), (1, 1)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_seen_as_pillow_sees_it(
    name: str, size: tuple[int, int], by_pillow: list[int], photos: list[Image.Image]
) -> None:
    write, direct = LAYOUTS[name]
    if name in ("4:4:0", "4:1:1") and min(size) < 16:
        pytest.skip("made from whole units of 16 px")
    file = write(photos[1].resize(size, Image.Resampling.BICUBIC))
    specs = [ViewSpec("a", 32, scale=(0.5, 1.0), augment=NOTHING)]
    job = job_of(specs, [file])
    (ours,) = render(specs, job, "native")
    assert min(size) < 5 or bool(by_pillow) != direct  # libjpeg enlarges very narrow planes in another way
    (exact,) = render(specs, job, "exact")
    assert (ours.float() - exact.float()).abs().mean() < 0.7


def test_rows_that_no_view_shows_are_not_decoded_and_change_nothing(jpegs: list[bytes]) -> None:
    top = ViewSpec("a", 32, augment=NOTHING)
    job = job_of([top], jpegs)
    crop = job.draws[0].crop.copy()
    crop[:, 0], crop[:, 2] = 0, crop[:, 2] // 3 + 1
    job = Job(job.images, [replace(job.draws[0], crop=crop)], job.names)
    whole = [top, ViewSpec("b", 32, crop="center", resize=32, augment=NOTHING)]
    with_all = Job(job.images, [*job.draws, *job_of(whole[1:], jpegs).draws], job.names)
    assert_array_equal(render([top], job, "native")[0], render(whole, with_all, "native")[0])


@pytest.mark.parametrize("size", [8, 40])
def test_a_scaled_decode_is_nearly_the_full_one(size: int, jpegs: list[bytes]) -> None:
    specs = [ViewSpec("a", size, scale=(0.5, 1.0), augment=NOTHING)]
    job = job_of(specs, jpegs)
    (full,), (scaled,) = render(specs, job, "native"), render_scaled(specs, job)
    difference = (full.float() - scaled.float()).abs()
    assert 0 < difference.mean() < 2.5


def test_an_image_of_which_one_view_is_not_reduced_is_never_scaled(jpegs: list[bytes]) -> None:
    specs = [ViewSpec("a", 8, augment=NOTHING), ViewSpec("b", 96, scale=(0.01, 0.02), augment=NOTHING)]
    job = job_of(specs, jpegs)
    for full, scaled in zip(render(specs, job, "native"), render_scaled(specs, job)):
        assert_array_equal(full, scaled)


def render_scaled(specs: list[ViewSpec], job: Job) -> list[torch.Tensor]:
    return render(specs, job, "native", decode="scaled")


SPECS = [ViewSpec("query", 48, count=2, augment=MOCO_V2), ViewSpec("strong", 24, augment=CLSA)]


@pytest.mark.parametrize("threads", [1, 3])
def test_pixels_do_not_depend_on_threads_or_on_the_samples_beside(threads: int, jpegs: list[bytes]) -> None:
    together = render(SPECS, job_of(SPECS, jpegs), "native")
    for i in (0, 7, 23):
        alone = render(SPECS, job_of(SPECS, [jpegs[i]], first_id=i), "native", threads=threads)
        for all_views, one in zip(together, alone):
            assert_array_equal(all_views[i], one[0])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_instruction_sets_agree_but_for_a_rounding_of_colours(
    suffix: str, jpegs: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resize counts in whole numbers, so only YCbCr, which becomes RGB behind it, can differ."""
    specs = [ViewSpec("a", size, augment=NOTHING) for size in (9, 96, 230)]
    files = jpegs if suffix == "jpg" else [encode(Image.open(io.BytesIO(file)), "png") for file in jpegs]
    job, original, views = job_of(specs, files), kernel.Kernel, []
    for name in SETS:
        monkeypatch.setattr(kernel, "Kernel", lambda name=name: original(instructions=name))
        views.append(torch.cat([view.flatten().int() for view in render(specs, job, "native")]))
    for other in views[1:]:
        assert (other - views[0]).abs().max() <= (suffix == "jpg")
        assert (other != views[0]).float().mean() < 1e-3


FAULTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda file: b"",
    "no image": lambda file: b"not an image at all",
    "cut in its header": lambda file: file[:100],
    "cut in its data": lambda file: file[: len(file) // 2],
    "its last byte gone": lambda file: file[:-1],
    "two bytes of an image": lambda file: file[:2],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_file_has_the_fault_or_the_pixels_that_exact_gives_it(name: str, jpegs: list[bytes]) -> None:
    specs = [ViewSpec("a", 32, scale=(0.9, 1.0), augment=NOTHING), ViewSpec("b", 32, scale=(0.9, 1.0), augment=NOTHING)]
    job = job_of(specs, jpegs)
    images = list(job.images)
    images[3], images[9] = FAULTS[name](images[3]), FAULTS[name](images[9])
    job = Job(images, job.draws, job.names)
    exact, ours = outcome(specs, job, "exact"), outcome(specs, job, "native")
    if isinstance(exact, dict):
        assert ours == exact
        assert set(exact) == {3, 9}
    else:
        assert not isinstance(ours, dict)
        assert all((a.float() - b.float()).abs().mean() < 0.5 for a, b in zip(ours, exact))


def outcome(specs: list[ViewSpec], job: Job, name: str) -> list[torch.Tensor] | dict[int, str]:
    """The views, or the faults."""
    try:
        return render(specs, job, name)
    except DecodeError as error:
        return error.faults


def test_a_file_cut_below_the_last_row_shown_is_a_fault_all_the_same(photos: list[Image.Image]) -> None:
    file = jpeg(photos[0])
    spec = ViewSpec("a", 32, augment=NOTHING)
    job = job_of([spec], [file])
    crop = np.array([[0, 0, 40, 40]], np.int32)
    job = Job([file[: len(file) * 3 // 4]], [replace(job.draws[0], crop=crop)], job.names)
    with pytest.raises(DecodeError, match=r"000000000.jpg cannot be decoded \(image file is truncated"):
        render([spec], job, "native")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_image_smaller_than_its_index_says_is_a_fault(suffix: str, photos: list[Image.Image]) -> None:
    spec = ViewSpec("a", 32, scale=(0.9, 1.0), augment=NOTHING)
    job = job_of([spec], [encode(photos[0])])
    small = Job([encode(photos[0].resize((50, 40)), suffix)], job.draws, job.names)
    with pytest.raises(DecodeError, match="is 50 x 40 px, but the index of its shards says otherwise"):
        render([spec], small, "native")


def test_an_image_with_a_side_beyond_any_jpegs_is_a_fault() -> None:
    """Its filter would be wider than a thread's stack."""
    spec = ViewSpec("a", 1, scale=(1.0, 1.0), ratio=(1e6, 1e7), augment=NOTHING)
    with pytest.raises(DecodeError, match=r"is 3000000 x 1 px, but the native backend takes sides of up to 65536 px"):
        render([spec], job_of([spec], [encode(Image.new("L", (3_000_000, 1)), "png")]), "native")


def test_a_progressive_file_with_thousands_of_scans_is_left_to_pillow(
    by_pillow: list[int], photos: list[Image.Image]
) -> None:
    file = jpeg(photos[0].resize((64, 64)), progressive=True)
    first, last = file.index(b"\xff\xda"), file.rindex(b"\xff\xda")
    bomb = file[:last] + file[last:-2] * 600 + file[-2:]
    assert first < last
    spec = ViewSpec("a", 32, augment=NOTHING)
    render([spec], job_of([spec], [bomb]), "native")
    assert by_pillow == [0]


def test_pixels_stay_while_a_tensor_is_held_and_their_memory_is_used_again_after(jpegs: list[bytes]) -> None:
    specs = [ViewSpec("a", 32, augment=NOTHING)]
    backend = make("native", specs, len(jpegs), device="cpu", threads=1, output="uint8", depth=1)

    def batch(epoch: int) -> torch.Tensor:
        backend.submit(job_of(specs, jpegs, epoch=epoch))
        return backend.collect()[0]

    held = batch(0)
    copy, part = held.clone(), held[3:5]
    addresses = {batch(epoch).data_ptr() for epoch in range(1, 9)}
    assert len(addresses) == 1
    assert held.data_ptr() not in addresses
    assert_array_equal(held, copy)
    del held
    gc.collect()
    batch(9)
    assert_array_equal(part, copy[3:5])  # a slice holds all of it
    backend.close()


def test_without_the_kernel_exact_makes_the_views_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, jpegs: list[bytes]
) -> None:
    monkeypatch.setattr(kernel, "why_not", lambda: "there is no kernel; install a C compiler")
    specs = [ViewSpec("a", 32, augment=MOCO_V2)]
    job = job_of(specs, jpegs)
    assert chosen("auto", "cpu") == chosen("native", "cpu") == "exact"
    for asked in ("auto", "native"):
        with pytest.warns(UserWarning, match="there is no kernel; install a C compiler"):
            views = render(specs, job, asked)
        assert_array_equal(views[0], render(specs, job, "exact")[0])


def test_auto_is_native_on_a_cpu() -> None:
    assert chosen("auto", "cpu") == "native"
    backend = make("auto", SPECS, 4, device="cpu", threads=1, output="uint8", depth=1)
    assert isinstance(backend, native.NativeBackend)
    backend.close()


def test_the_kernel_was_compiled_from_the_source_beside_it() -> None:
    """Else `python -m pipelines.native.build` has to run again."""
    assert kernel.source_digest() == build.source_digest()


def test_a_compiler_that_refuses_leaves_the_kernel_that_was_there(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "libviews.so"
    library.write_bytes(b"earlier")
    monkeypatch.setenv("CC", "false")
    with pytest.raises(build.BuildError, match="the C compiler refused"):
        build.build(library)
    assert [path.name for path in tmp_path.iterdir()] == ["libviews.so"]
    assert library.read_bytes() == b"earlier"
