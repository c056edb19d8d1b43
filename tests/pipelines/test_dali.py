"""The DALI backend on the CPU: jobs in flight, output types, formats, faults. Tolerances: test_tolerances.py."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines import strong
from pipelines.augment import AugmentSpec
from pipelines.backends import Backend, DecodeError, Job, make
from pipelines.draw import draw_view
from pipelines.native import kernel
from pipelines.views import ViewSpec, normalize
from tests.pipelines import jobs
from tests.pipelines.jobs import CLSA, MOCO_V1, MOCO_V2, SWAV, job_of, strong_job
from tests.shards import encode

pytest.importorskip("nvidia.dali")
from pipelines.backends.dali.colour_on_cpu import ColourOnCpu

SOLARIZE = replace(MOCO_V2, solarize_p=0.5)

RECIPES = {
    "moco_v1": [ViewSpec("query", 224, augment=MOCO_V1), ViewSpec("key", 224, augment=MOCO_V1)],
    "moco_v2": [ViewSpec("query", 224, augment=MOCO_V2), ViewSpec("key", 224, augment=MOCO_V2)],
    "swav": [
        ViewSpec("global", 224, count=2, scale=(0.14, 1.0), augment=SWAV),
        ViewSpec("local", 96, count=6, scale=(0.05, 0.14), augment=SWAV),
    ],
    "clsa": [
        ViewSpec("key", 224, augment=MOCO_V2),
        ViewSpec("query", 224, augment=MOCO_V2),
        ViewSpec("strong", 96, scale=(0.086, 0.429), augment=CLSA),
    ],
    "solarize": [ViewSpec("query", 32, augment=SOLARIZE)],
    "center": [ViewSpec("image", 224, crop="center", resize=256, augment=AugmentSpec(flip_p=0.0))],
}
# Every operation, a size that is no multiple of 4, and views that differ: as much as fits into little time.
SMALL = [
    ViewSpec("global", 42, scale=(0.3, 1.0), augment=replace(SWAV, solarize_p=0.3)),
    ViewSpec("local", 31, scale=(0.1, 0.3), augment=replace(MOCO_V1, jitter_p=0.7)),
    ViewSpec("strong", 27, augment=AugmentSpec(strong_draws=4)),
]
CENTER = [ViewSpec("image", 64, crop="center", resize=72, augment=AugmentSpec(flip_p=0.0))]


def backend(specs: Sequence[ViewSpec], name: str = "dali", **options: Any) -> Backend:
    defaults: dict[str, Any] = {"batch_size": 16, "device": "cpu", "threads": 2, "output": "uint8", "depth": 2}
    return make(name, specs, **(defaults | options))


def render(specs: Sequence[ViewSpec], job: Job, name: str = "dali", **options: Any) -> list[Tensor]:
    return jobs.render(specs, job, name, **options)


def mean_difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().mean())


@pytest.fixture(scope="module")
def files(photos: list[Image.Image]) -> list[bytes]:
    """Twelve JPEG files of 120 to 250 px cut from the photographs, one of them grayscale."""
    rng = np.random.default_rng(3)
    made = []
    for i in range(12):
        photo = photos[i % len(photos)]
        width, height = rng.integers(120, 251, 2).tolist()
        left, top = int(rng.integers(0, photo.width - width)), int(rng.integers(0, photo.height - height))
        patch = photo.crop((left, top, left + width, top + height))
        made.append(encode(patch.convert("L") if i == 5 else patch))
    return made


def test_the_pixels_do_not_depend_on_threads_or_on_jobs_in_flight(files: list[bytes]) -> None:
    jobs = [job_of(SMALL, files, epoch=epoch) for epoch in range(4)]
    expected = [render(SMALL, job, threads=1) for job in jobs]
    for threads, depth in ((1, 3), (2, 1), (2, 3)):
        renderer = backend(SMALL, threads=threads, depth=depth)
        collected = []
        for i, job in enumerate(jobs):
            renderer.submit(job)
            if i + 1 >= depth:
                collected.append(renderer.collect())
        collected += [renderer.collect() for _ in range(depth - 1)]
        renderer.close()
        for views, expected_views in zip(collected, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(views, expected_views, strict=True))


def test_batches_of_any_size_up_to_the_largest_give_the_same_pixels(files: list[bytes]) -> None:
    whole = render(SMALL, job_of(SMALL, files))
    renderer = backend(SMALL, batch_size=7)
    parts = []
    for first, last in ((0, 7), (7, 8), (8, 12)):
        renderer.submit(job_of(SMALL, files[first:last], first_id=first))
        parts.append(renderer.collect())
    renderer.close()
    for view, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[view] for part in parts]), expected)


def test_views_are_channels_last_and_stay_what_they_are_while_later_jobs_run(files: list[bytes]) -> None:
    renderer = backend(SMALL, depth=1)
    renderer.submit(job_of(SMALL, files))
    views = renderer.collect()
    copies = [view.clone() for view in views]
    for epoch in range(1, 6):
        renderer.submit(job_of(SMALL, files, epoch=epoch))
        renderer.collect()
    renderer.close()
    for view, copy, spec in zip(views, copies, SMALL, strict=True):
        assert view.shape == (len(files), 3, spec.size, spec.size)
        assert view.dtype == torch.uint8
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, copy)


@pytest.mark.parametrize(("output", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
def test_float_outputs_are_the_normalised_pixels(files: list[bytes], output: str, tolerance: float) -> None:
    augment = replace(SMALL[0].augment, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.4))
    specs = [replace(SMALL[0], augment=augment), *SMALL[1:]]
    job = job_of(specs, files)
    for floats, pixels, spec in zip(render(specs, job, output=output), render(specs, job), specs, strict=True):
        expected = normalize(pixels, spec.augment.mean, spec.augment.std, torch.float32)
        assert floats.dtype == getattr(torch, output)
        assert floats.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(floats.float(), expected, atol=tolerance, rtol=tolerance)


def test_a_flipped_view_is_the_mirror_image(files: list[bytes]) -> None:
    for spec in (ViewSpec("a", 50), replace(CENTER[0], augment=AugmentSpec())):
        job = job_of([spec], files)
        turned = replace(job.draws[0], flip=~job.draws[0].flip)
        (view,), (mirrored,) = render([spec], job), render([spec], Job(job.images, [turned], job.names))
        assert (view.int() - mirrored.flip(3).int()).abs().max() <= 1  # a half may round to either side


def test_a_crop_reads_nothing_from_beside_its_box() -> None:
    frame = np.full((40, 60, 3), 255, dtype=np.uint8)
    frame[10:30, 20:45] = 90
    spec = ViewSpec("a", 24, augment=AugmentSpec(flip_p=0.0))
    draws = replace(draw_view(spec, 0, 0, 0, [0], [60], [40]), crop=np.array([[10, 20, 20, 25]], dtype=np.int32))
    (view,) = render([spec], Job([encode(Image.fromarray(frame), "png")], [draws], ["a:b"]))
    assert view.min() == view.max() == 90


def _as(photo: Image.Image, mode: str, suffix: str, **options: Any) -> bytes:
    file = io.BytesIO()
    photo.convert(mode).save(file, suffix, **options)
    return file.getvalue()


FORMATS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gray JPEG": ("L", "JPEG", {}),
    "CMYK JPEG": ("CMYK", "JPEG", {}),
    "progressive JPEG": ("RGB", "JPEG", {"progressive": True, "quality": 80}),
    "JPEG without chroma subsampling": ("RGB", "JPEG", {"subsampling": 0}),
    "PNG": ("RGB", "PNG", {}),
    "PNG with a palette": ("P", "PNG", {}),
    "PNG with transparency": ("RGBA", "PNG", {}),
    "gray PNG": ("L", "PNG", {}),
    "WebP": ("RGB", "WEBP", {"lossless": True}),
    "BMP": ("RGB", "BMP", {}),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_are_decoded_as_pillow_decodes_them(photos: list[Image.Image], kind: str) -> None:
    mode, suffix, options = FORMATS[kind]
    job = job_of(CENTER, [_as(photo.resize((150, 110)), mode, suffix, **options) for photo in photos])
    (view,), (exact,) = render(CENTER, job), render(CENTER, job, "exact")
    assert mean_difference(view, exact) < 0.2
    assert (view.int() - exact.int()).abs().max() <= 2


def test_an_exif_orientation_is_ignored(photos: list[Image.Image]) -> None:
    photo, exif = photos[0].resize((150, 110)), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = _as(photo, "RGB", "JPEG", exif=exif, quality=90)
    job = job_of(CENTER, [turned, encode(photo)])
    (view,) = render(CENTER, job)
    assert torch.equal(view[0], view[1])


def test_pngs_of_16_bits_are_scaled_where_pillow_clips_them() -> None:
    """A known difference: `shard_tools pack` can convert such files, then both agree."""
    ramp = np.linspace(0, 65535, 100 * 100, dtype=np.uint16).reshape(100, 100)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    job = job_of(CENTER, [file.getvalue()])
    assert 120 < render(CENTER, job)[0].float().mean() < 135
    assert render(CENTER, job, "exact")[0].float().mean() > 250


def test_images_of_extreme_shapes_become_views_of_the_right_size(photos: list[Image.Image]) -> None:
    sizes = [(1, 1), (1, 90), (90, 1), (700, 3), (3000, 2000)]
    files = [encode(photos[0].resize(size), "png") for size in sizes]
    for specs in (SMALL[:2], [replace(CENTER[0], size=8, resize=8)]):  # strong draws can amplify any difference
        job = job_of(specs, files)
        for view, exact in zip(render(specs, job), render(specs, job, "exact"), strict=True):
            assert view.shape == exact.shape
            assert mean_difference(view, exact) < 1.0


STRONG_ONLY = ViewSpec("a", 32, crop="center", resize=32, augment=AugmentSpec(flip_p=0.0, strong_draws=1))


@pytest.mark.parametrize("name", strong.POOL)
def test_images_of_one_colour_become_under_strong_draws_what_pillow_makes_of_them(name: str) -> None:
    """No channel has a range that could be stretched, no histogram that could be equalized."""
    colours = [(0, 0, 0), (255, 255, 255), (0, 255, 77), (130, 129, 128)]
    job = strong_job(STRONG_ONLY, [encode(Image.new("RGB", (32, 32), colour), "png") for colour in colours], name)
    (view,), (exact,) = render([STRONG_ONLY], job), render([STRONG_ONLY], job, "exact")
    assert (view.int() - exact.int()).abs().max() <= 1


def test_strong_draws_of_a_view_are_done_in_their_order(photos: list[Image.Image]) -> None:
    spec = replace(STRONG_ONLY, augment=AugmentSpec(flip_p=0.0, strong_draws=3))
    job = strong_job(spec, [encode(photos[0].resize((32, 32)), "png")] * 6, "solarize")
    names = list(permutations(("contrast", "solarize", "translate_x")))
    job.draws[0].strong_operation[:] = [[strong.POOL.index(name) for name in order] for order in names]
    job.draws[0].strong_level[:] = 3
    (view,), (exact,) = render([spec], job), render([spec], job, "exact")
    assert torch.equal(view, exact)
    assert len(torch.unique(view, dim=0)) == 4  # only solarize and translate_x commute, when one follows the other


def test_the_compiled_kernel_and_numpy_make_the_same_of_the_same_crops(photos: list[Image.Image]) -> None:
    if why_not := kernel.why_not():
        pytest.skip(why_not)
    spec = ViewSpec("a", 40, augment=replace(CLSA, solarize_p=0.5))
    crops = np.stack([np.asarray(photos[i % len(photos)].resize((40 + i, 40 + i)))[i:, i:] for i in range(24)])
    sizes = np.full(24, 40)
    draws = draw_view(spec, 0, 7, 0, np.arange(24), sizes, sizes)
    made = []
    for compiled in (True, False):
        colour = ColourOnCpu([spec], 2, "uint8", compiled=compiled)
        made += colour([torch.from_numpy(crops.copy())], [draws])
        colour.close()
    assert (made[0] != made[1]).float().mean() < 0.01  # the kernel's hue may round otherwise
    assert mean_difference(made[0], torch.from_numpy(crops).permute(0, 3, 1, 2)) > 10


BAD_FILES = {
    "cut in half": lambda file: file[: len(file) // 2],
    "empty": lambda file: b"",
    "one byte": lambda file: b"x",
    "text": lambda file: b"<html>404 not found</html>",
    "zeros": lambda file: bytes(len(file)),
    "damaged header": lambda file: file[:2] + bytes(200) + file[202:],
    "GIF": lambda file: _as(Image.open(io.BytesIO(file)), "P", "GIF"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_sample_is_named_and_costs_only_its_own_batch(files: list[bytes], kind: str) -> None:
    good = job_of(CENTER, files[:6])
    (expected,) = render(CENTER, good)
    bad = job_of(CENTER, files[:6], first_id=100)
    bad.images[2] = BAD_FILES[kind](files[2])  # type: ignore[index]
    renderer = backend(CENTER, depth=3)
    for job in (good, bad, good):
        renderer.submit(job)
    assert torch.equal(renderer.collect()[0], expected)
    with pytest.raises(DecodeError, match=r"train-000000.tar:000000102\.jpg cannot be decoded") as raised:
        renderer.collect()
    assert "000000101" not in str(raised.value)
    assert torch.equal(renderer.collect()[0], expected)
    renderer.submit(good)
    assert torch.equal(renderer.collect()[0], expected)
    renderer.submit(bad)
    renderer.close()  # with a failing job in flight: neither hangs nor raises
    renderer.close()


def test_every_bad_sample_of_a_batch_is_named(files: list[bytes]) -> None:
    job = job_of(CENTER, files[:6])
    job.images[0] = job.images[4] = b""  # type: ignore[index]
    with pytest.raises(DecodeError, match=r"000000000\.jpg .*000000004\.jpg "):
        render(CENTER, job)


def test_a_crop_beyond_the_image_is_reported_as_a_stale_index(files: list[bytes]) -> None:
    spec = ViewSpec("a", 32)
    job = job_of([spec], files[:4])
    job.draws[0].crop[3] = (0, 0, 900, 20)
    with pytest.raises(DecodeError, match=r"000000003\.jpg is \d+ x \d+ px, but its index says otherwise"):
        render([spec], job)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gpu_makes_the_views_of_the_exact_backend(files: list[bytes], recipe: str) -> None:
    job = job_of(RECIPES[recipe], files)
    views = render(RECIPES[recipe], job, device="cuda:0", depth=2)
    for view, exact in zip(views, render(RECIPES[recipe], job, "exact"), strict=True):
        assert view.is_cuda
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert mean_difference(view.cpu(), exact) < 1.0  # not measured yet; 0.5 holds on the CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_gpu_that_is_not_there_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"'cuda:0'.*set it to cpu"):
        backend(CENTER, device="cuda:0")


def test_without_dali_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith("pipelines.backends.dali")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ValueError, match=r"fastssl-train\[dali\]"):
        importlib.import_module("pipelines.backends.dali")
