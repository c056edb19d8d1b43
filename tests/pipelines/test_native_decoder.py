"""The kernel's own JPEG decoder: the bytes of libjpeg on every file that it takes, and the same files refused.

The oracle is the kernel with all files decoded by libjpeg; what is rendered from the planes is the same code.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from PIL import Image

from pipelines.augment import AugmentSpec
from pipelines.backends import Job
from pipelines.backends.native import Work, strong_numbers
from pipelines.native import kernel
from pipelines.views import ViewSpec, flatten
from tests.faults.memory import resident_mb
from tests.pipelines.jobs import job_of
from tests.shards import encode

HAS_DECODER = not kernel.why_not() and kernel.Kernel().instructions != "plain"
pytestmark = pytest.mark.skipif(not HAS_DECODER, reason="the kernel has a decoder of its own for AVX2 only")

ROUNDS = int(os.environ.get("FASTSSL_FUZZ_ROUNDS", "800"))
SPECS = [ViewSpec("a", 40, count=2, scale=(0.05, 1.0), augment=AugmentSpec(flip_p=0.0))]


class Road:
    """Renders one file at a time; `taken` counts the files that the kernel decoded itself."""

    def __init__(self, **options: Any) -> None:
        self._kernel = kernel.Kernel(**options)

    def render(self, file: bytes, job: Job, scaled: bool = False) -> tuple[int, list[np.ndarray]]:
        """What became of the file, and its views with the draws of `job`."""
        specs = [spec for _, spec in flatten(SPECS)]
        pixels = [torch.zeros((1, spec.size, spec.size, 3), dtype=torch.uint8) for spec in specs]
        work = Work(Job([file], job.draws, job.names), specs, pixels, [strong_numbers(spec.size) for spec in specs])
        self._kernel.render_files(work.files, work.num_bytes, range(1), work.views, scaled, work.done)
        return int(work.done[0]), [view.numpy() for view in pixels]

    @property
    def taken(self) -> int:
        return self._kernel.num_decoded()["kernel"]


@pytest.fixture(scope="module")
def own() -> Road:
    return Road()


@pytest.fixture(scope="module")
def libjpegs() -> Road:
    return Road(by_libjpeg=True)


def patch(photo: Image.Image, width: int, height: int, seed: int = 0) -> Image.Image:
    left, top = np.random.default_rng(seed).integers(0, (photo.width - width, photo.height - height)).tolist()
    return photo.crop((left, top, left + width, top + height))


def assert_same(own: Road, libjpegs: Road, file: bytes, image: Image.Image, seeds: range) -> None:
    for seed in seeds:
        job = job_of(SPECS, [encode(image, "png")], first_id=seed)
        (ours, our_views), (theirs, their_views) = own.render(file, job), libjpegs.render(file, job)
        assert ours == theirs
        if ours == kernel.DONE:
            assert_array_equal(our_views, their_views)


@pytest.mark.parametrize("quality", [1, 10, 50, 75, 92, 100])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_planes_are_libjpegs_at_every_quality_and_subsampling(
    quality: int, subsampling: int, own: Road, libjpegs: Road, photos: list[Image.Image]
) -> None:
    before = own.taken
    for i, photo in enumerate(photos):
        image = patch(photo, 173 + i, 131 - i)
        file = encode(image, quality=quality, subsampling=subsampling, optimize=i % 2 == 1)
        assert_same(own, libjpegs, file, image, range(6))
    assert own.taken - before == 6 * len(photos)
    assert libjpegs.taken == 0


@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_planes_are_libjpegs_whatever_the_size(
    subsampling: int, own: Road, libjpegs: Road, photos: list[Image.Image]
) -> None:
    before = own.taken
    for width in (*range(1, 20), 33):
        for height in (1, 2, 7, 8, 9, 15, 16, 17, 40):
            image = patch(photos[0], width, height, seed=width)
            assert_same(own, libjpegs, encode(image, subsampling=subsampling), image, range(1))
    narrow = 4 if subsampling else 0  # libjpeg enlarges planes of up to two columns in another way
    assert own.taken - before == (20 - narrow) * 9


OTHERS: dict[str, tuple[dict[str, Any], bool]] = {  # name: (options, does the kernel decode it itself?)
    "gray": ({"mode": "L"}, True),
    "restart markers": ({"restart_marker_blocks": 5}, True),
    "restart markers of every unit": ({"restart_marker_blocks": 1, "subsampling": 2}, True),
    "more than eight restart markers": ({"restart_marker_rows": 1, "quality": 30}, True),
    "a comment and a profile": ({"comment": b"any", "icc_profile": b"x" * 99}, True),
    "progressive": ({"progressive": True}, False),
    "RGB": ({"keep_rgb": True}, False),
    "CMYK": ({"mode": "CMYK"}, False),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_forms_are_libjpegs_too(name: str, own: Road, libjpegs: Road, photos: list[Image.Image]) -> None:
    options, is_taken = OTHERS[name]
    options = dict(options)
    image = patch(photos[2], 150, 120)
    before = own.taken
    file = encode(image.convert(options.pop("mode", "RGB")), **options)
    assert_same(own, libjpegs, file, image, range(8))
    assert own.taken - before == 8 * is_taken


def edited(file: bytes, name: str) -> bytes:
    """The file with another header that means the same, or something that must be left to libjpeg."""
    start = file.index(b"\xff\xdb")
    without_jfif = file[:2] + file[start:]
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
    frame = file.index(b"\xff\xc0")
    if name == "no JFIF marker":
        return without_jfif
    if name == "Adobe's marker":
        return without_jfif[:2] + adobe + b"\x01" + without_jfif[2:]
    if name == "Adobe's marker of RGB":
        return without_jfif[:2] + adobe + b"\x00" + without_jfif[2:]
    if name == "extended instead of baseline":
        return file[: frame + 1] + b"\xc1" + file[frame + 2 :]
    if name == "JFIF of version 2":
        return file.replace(b"JFIF\x00\x01", b"JFIF\x00\x02", 1)
    if name == "filling in front of a marker":
        return file[:frame] + b"\xff" + file[frame:]
    if name == "bytes behind its end":
        return file + b"\x00" * 20
    if name == "no end marker":
        return file[:-2]
    if name == "a second frame":
        length = 2 + int.from_bytes(file[frame + 2 : frame + 4], "big")
        return file[:frame] + file[frame : frame + length] + file[frame:]
    raise ValueError(name)


EDITS = {  # name: does the kernel decode it itself?
    "no JFIF marker": True, "Adobe's marker": True, "extended instead of baseline": True,
    "Adobe's marker of RGB": False, "JFIF of version 2": False, "filling in front of a marker": False,
    "bytes behind its end": False, "no end marker": False, "a second frame": False,
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_unusual_headers_are_understood_or_left_to_libjpeg(
    name: str, own: Road, libjpegs: Road, photos: list[Image.Image]
) -> None:
    image = patch(photos[1], 100, 90)
    before = own.taken
    assert_same(own, libjpegs, edited(encode(image), name), image, range(3))
    assert own.taken - before == 3 * EDITS[name]


def test_a_scaled_decode_is_libjpegs(own: Road, libjpegs: Road, photos: list[Image.Image]) -> None:
    image = photos[3].crop((0, 0, 320, 320))
    job = job_of(SPECS, [encode(image, "png")], first_id=3)
    crops = [draws.crop for draws in job.draws]
    assert min(crop[0, 2:].min() for crop in crops) >= 80  # twice the view and more
    before = own.taken
    ours, theirs = own.render(encode(image), job, scaled=True), libjpegs.render(encode(image), job, scaled=True)
    assert_array_equal(ours[1], theirs[1])
    assert own.taken == before


def test_blocks_that_no_view_shows_are_not_needed(own: Road, libjpegs: Road, photos: list[Image.Image]) -> None:
    """Memory of the file before lies where blocks are left out: what it holds does not matter."""
    image = patch(photos[0], 200, 160)
    for subsampling in (0, 1, 2):
        for seed in range(40):
            before = Image.new("RGB", image.size, (255 * (seed % 2),) * 3)
            own.render(encode(before), job_of(SPECS, [encode(image, "png")]))
            assert_same(own, libjpegs, encode(image, subsampling=subsampling), image, range(seed, seed + 1))


def test_a_damaged_file_is_decoded_as_libjpeg_does_or_left_to_it(
    own: Road, libjpegs: Road, photos: list[Image.Image]
) -> None:
    """Bytes changed anywhere, files cut: garbage too is the same garbage, and what one refuses the other refuses."""
    rng = np.random.default_rng(11)
    rendered = 0
    before = own.taken
    for round_ in range(ROUNDS):
        width, height = rng.integers(5, 120, 2).tolist()
        image = patch(photos[round_ % len(photos)], width, height, seed=round_)
        options: dict[str, Any] = {"quality": int(rng.choice([5, 75, 92])), "subsampling": int(rng.integers(3))}
        if rng.integers(3) == 0:
            options["restart_marker_blocks"] = int(rng.integers(1, 9))
        file = bytearray(encode(image, **options))
        header = bytes(file).index(b"\xff\xda")
        for _ in range(rng.integers(1, 4)):
            place = rng.integers(0, header) if rng.integers(3) == 0 else rng.integers(header, len(file))
            file[place] = rng.integers(256)
        if rng.integers(8) == 0:
            del file[rng.integers(1, len(file)) :]
        job = job_of(SPECS, [encode(image, "png")], first_id=round_)
        (ours, our_views), (theirs, their_views) = own.render(bytes(file), job), libjpegs.render(bytes(file), job)
        assert ours == theirs
        if ours == kernel.DONE:
            rendered += 1
            assert_array_equal(our_views, their_views)
    assert rendered > ROUNDS // 4
    assert own.taken - before > ROUNDS // 10


def test_numbers_that_overflow_libjpegs_16_bits_are_left_to_it(own: Road, libjpegs: Road) -> None:
    """White by twelve times its step: libjpeg makes black of it."""
    image = Image.new("L", (64, 64), 255)
    file = bytearray(encode(image, quality=100))
    file[file.index(b"\xff\xdb") + 5] = 12
    before = own.taken
    assert_same(own, libjpegs, bytes(file), image, range(2))
    assert own.taken == before


@pytest.mark.parametrize("progressive", [False, True])
def test_memory_of_a_large_image_is_given_back_whoever_decoded_it(
    progressive: bool, own: Road, photos: list[Image.Image]
) -> None:
    small = patch(photos[0], 60, 60)
    large = encode(small.resize((5000, 5000)), subsampling=0, progressive=progressive)
    small_job = job_of(SPECS, [encode(small, "bmp")])
    whole = np.array([[0, 0, 5000, 5000]], np.int32)
    job = Job([large], [replace(draws, crop=whole) for draws in small_job.draws], small_job.names)
    own.render(encode(small), small_job)
    before = resident_mb()
    assert own.render(large, job)[0] == kernel.DONE
    held = resident_mb() - before
    assert own.render(encode(small), small_job)[0] == kernel.DONE
    assert held > 60
    assert resident_mb() - before < 20
