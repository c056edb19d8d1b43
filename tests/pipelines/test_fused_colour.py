"""The Triton kernels: the bytes of the exact backend under the interpreter, and code for a GPU without one at hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from pipelines import strong
from pipelines.augment import AugmentSpec
from pipelines.backends.exact import apply_chain, apply_strong
from pipelines.draw import draw_view
from pipelines.views import ViewSpec, normalize
from tests.pipelines.fused_interpreter import Case, render
from tests.pipelines.jobs import CLSA, MOCO_V1, MOCO_V2, SWAV
from tests.pipelines.test_dali import SOLARIZE

triton = pytest.importorskip("triton")

SIZE = 24
NOTHING = AugmentSpec(flip_p=0.0)
JITTER = replace(NOTHING, jitter_p=1.0)
CHAINS = {
    "brightness": replace(JITTER, brightness=0.8),
    "contrast": replace(JITTER, contrast=0.8),
    "saturation": replace(JITTER, saturation=0.8),
    "hue 0.1": replace(JITTER, hue=0.1),
    "hue 0.5": replace(JITTER, hue=0.5),
    "jitter beyond 1": replace(JITTER, brightness=1.5, contrast=1.5, saturation=1.5, hue=0.2),
    "grayscale": replace(NOTHING, grayscale_p=0.5),
    "blur": replace(NOTHING, blur_p=0.8),
    "wide blur": replace(NOTHING, blur_p=1.0, blur_sigma=(0.1, 4.0)),
    "solarize": replace(NOTHING, solarize_p=0.5, solarize_threshold=100),
    "MoCo v1": MOCO_V1,
    "MoCo v2": MOCO_V2,
    "SwAV": SWAV,
    "solarization": SOLARIZE,
    "CLSA": CLSA,
}


def _case(augment: AugmentSpec, pixels: npt.NDArray[np.uint8], **options: object) -> Case:
    num, size = pixels.shape[:2]
    spec = ViewSpec("a", size, augment=augment)
    each = np.full(num, size)
    return replace(Case(spec, draw_view(spec, 0, 5, 1, np.arange(num), each, each), pixels), **options)  # type: ignore[arg-type]


def _strong_case(name: str, pixels: npt.NDArray[np.uint8]) -> Case:
    """Sample i: the operation `name` at level 1 + i % 9, the first nine to one side and the others to the other."""
    case = _case(replace(NOTHING, strong_draws=1), pixels)
    places = np.arange(len(pixels), dtype=np.int8)[:, None]
    draws = replace(
        case.draws,
        strong_operation=np.full_like(places, strong.POOL.index(name)),
        strong_level=1 + places % strong.LEVELS,
        strong_sign=np.where(places < strong.LEVELS, 1, -1).astype(np.int8),
    )
    return replace(case, draws=draws)


@pytest.fixture(scope="module")
def cases(photos: list[Image.Image]) -> dict[str, Case]:
    """Parts of photographs and, among them, noise, which has every order and distance of the channels."""
    rng = np.random.default_rng(2)
    pixels = []
    for i in range(12):
        photo, side = photos[i % len(photos)], int(rng.integers(30, 200))
        left, top = int(rng.integers(0, photo.width - side)), int(rng.integers(0, photo.height - side))
        pixels.append(np.asarray(photo.crop((left, top, left + side, top + side)).resize((SIZE, SIZE))))
    pixels[3] = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    pixels[7] = np.repeat(rng.integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8), 3, axis=2)
    images = np.stack(pixels)
    colours = np.array([(0, 0, 0), (255, 255, 255), (0, 255, 77), (130, 129, 128)], dtype=np.uint8)
    flat = np.broadcast_to(colours[:, None, None], (4, SIZE, SIZE, 3)).copy()
    some = images[:9:2].repeat(4, axis=0)[:18]
    made = {name: _case(augment, images) for name, augment in CHAINS.items()}
    made |= {f"strong {name}": _strong_case(name, some) for name in strong.POOL}
    made |= {f"{name} of one colour": _strong_case(name, flat) for name in ("auto_contrast", "equalize", "contrast")}
    made["equalize of few pixels"] = _strong_case("equalize", images[:3, :14, :14].copy())
    made["all colours under hue"] = _case(CHAINS["hue 0.5"], rng.integers(0, 256, (6, 60, 60, 3), dtype=np.uint8))
    made["smaller than the blur"] = _case(replace(NOTHING, blur_p=1.0), images[:3, :5, :5].copy())
    made["several blocks an image"] = _case(CHAINS["jitter beyond 1"], images[:3, :23, :23].copy(), block=128)
    made["several blocks, blurred"] = _case(MOCO_V2, images[:2, :17, :17].copy(), block=256)
    made["float16"] = _case(SOLARIZE, images[:4].copy(), output="float16")
    made["float32 after strong draws"] = _case(CLSA, images[:4].copy(), output="float32")
    return made


@pytest.fixture(scope="module")
def rendered(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, npt.NDArray[np.generic]]:
    return render(cases, tmp_path_factory.mktemp("fused"))


def _exact(case: Case) -> npt.NDArray[np.uint8]:
    """What the exact backend makes of the same crops; the flip is already in them."""
    every = slice(0, len(case.pixels))
    planes = np.ascontiguousarray(case.pixels.transpose(3, 0, 1, 2))
    apply_chain(planes, case.spec.augment, case.draws, every)
    pixels = np.ascontiguousarray(planes.transpose(1, 2, 3, 0))
    apply_strong(pixels, case.draws, every)
    return pixels


def test_every_operation_and_every_chain_gives_the_bytes_of_the_exact_backend(
    cases: dict[str, Case], rendered: dict[str, npt.NDArray[np.generic]]
) -> None:
    unchanged = {name for name, case in cases.items() if np.array_equal(_exact(case), case.pixels)}
    assert unchanged == {
        "strong identity",
        "auto_contrast of one colour",
        "equalize of one colour",
        "equalize of few pixels",
    }
    wrong = {
        name: np.abs(rendered[name].astype(int) - _exact(case)).max()
        for name, case in cases.items()
        if case.output == "uint8" and not np.array_equal(rendered[name], _exact(case))
    }
    assert not wrong


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("float32 after strong draws", torch.float32)])
def test_float_outputs_are_the_normalised_bytes(
    cases: dict[str, Case], rendered: dict[str, npt.NDArray[np.generic]], name: str, dtype: torch.dtype
) -> None:
    pixels = torch.from_numpy(_exact(cases[name])).permute(0, 3, 1, 2)
    augment = cases[name].spec.augment
    expected = normalize(pixels, augment.mean, augment.std, dtype)
    view = torch.from_numpy(rendered[name]).permute(0, 3, 1, 2)
    assert view.dtype == dtype
    torch.testing.assert_close(view, expected, atol=1e-5, rtol=1e-3 if dtype == torch.float16 else 1e-5)


KERNELS = ("mean_luma", "jitter", "blur_rows", "finish", "strong_table", "strong_apply")
_POINTERS = {"rows": "*i32", "floats": "*fp32", "out": "*fp16"}
_NUMBERS = dict.fromkeys(("row", "size", "threshold", "start"), "i32")
_CONSTANTS = {"GRAYSCALE_FIRST": False, "BLOCK": 1024, "REACH": 2, "BLURS": True, "NORMALIZED": True}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_an_h100_without_what_would_change_their_rounding(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs no GPU. Contracted multiply-adds and approximate divisions would round as no CPU does."""
    from pipelines.backends import fused_colour_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels, name)
    constants = {argument: _CONSTANTS[argument] for argument in kernel.arg_names if argument.isupper()}
    signature = dict.fromkeys(kernel.arg_names, "*u8") | dict.fromkeys(constants, "constexpr")
    for argument in signature:
        if argument.startswith(("scale_", "bias_")):
            signature[argument] = "fp32"
        elif argument in _NUMBERS:
            signature[argument] = _NUMBERS[argument]
        elif argument in _POINTERS and (argument != "out" or "NORMALIZED" in constants):
            signature[argument] = _POINTERS[argument]
    source = triton.compiler.ASTSource(kernel, signature, constants)
    h100 = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=h100, options={"enable_fp_fusion": False})
    assert len(compiled.asm["cubin"]) > 1000
    for inexact in ("fma.rn.f", "div.full", "div.approx"):
        assert inexact not in compiled.asm["ptx"]
