"""The compiled kernel of the native backend, as functions: kernel.h says what they do.

Ordinary JPEG files are decoded by the kernel itself where the processor has AVX2, all others by the libjpeg that Pillow
has loaded; both decode to the same bytes.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import _imaging

from pipelines.native.build import LIBRARY

INSTRUCTIONS = ("plain", "avx2", "avx512")
DONE, NOT_FOR_US, OTHER_SIZE, NO_MEMORY = range(4)

_LIBJPEG = ("jpeg_std_error", "jpeg_CreateDecompress", "jpeg_mem_src", "jpeg_read_header", "jpeg_start_decompress",
            "jpeg_read_raw_data", "jpeg_abort_decompress", "jpeg_destroy_decompress")  # fmt: skip
DRAWN = {  # fields of `pipelines.draw.ViewDraws` in view_t's order
    "crop": np.int32, "flip": np.bool_, "jitter": np.bool_, "grayscale": np.bool_, "solarize": np.bool_,
    "order": np.int8, "brightness": np.float32, "contrast": np.float32, "saturation": np.float32, "hue": np.float32,
    "sigma": np.float32, "strong_operation": np.int8, "strong_level": np.int8, "strong_sign": np.int8,
}  # fmt: skip
_NUMBERS = ("size", "resize", "operations", "grayscale_first", "solarize_threshold", "num_strong")


_MARGIN = 64  # MARGIN of kernel.h


class KernelError(RuntimeError):
    """The kernel cannot be used; the message says why and what to do."""


class View(ctypes.Structure):
    """view_t of kernel.h: addresses of arrays, which the caller keeps alive, and numbers."""

    _fields_ = [(name, c_void_p) for name in ("pixels", *DRAWN, "strong_numbers")] + [
        (name, c_int32) for name in _NUMBERS
    ]


class Kernel:
    """Renders views; every thread has a worker of its own, which lives as long as the thread.

    instructions    one of INSTRUCTIONS; the best that the processor has by default
    by_libjpeg      let it decode all files
    Raises KernelError.
    """

    def __init__(self, path: Path = LIBRARY, instructions: str = "", by_libjpeg: bool = False) -> None:
        self._functions = _load(path)
        best = self._functions.best_instructions()
        wanted = INSTRUCTIONS.index(instructions) if instructions else best
        if wanted > best:
            raise KernelError(f"this processor has no {instructions}; its best is {INSTRUCTIONS[best]}")
        self.instructions = INSTRUCTIONS[wanted]
        self._libjpeg, self._by_libjpeg = _libjpeg(), by_libjpeg
        self._workers = threading.local()
        self._num_decoded: list[npt.NDArray[np.int64]] = []  # an array a worker: each counts alone
        self._worker()  # so that a library that does not fit is noticed here

    def render_files(
        self,
        files: ctypes.Array[c_char_p],
        num_bytes: npt.NDArray[np.int64],
        part: range,
        views: ctypes.Array[View],
        scaled: bool,
        done: npt.NDArray[np.int32],
    ) -> None:
        """Render all views of samples `part`; done[i] is DONE, or why sample i was not rendered."""
        worker, first, last = self._worker(), part.start, part.stop
        self._functions.render_files(
            worker.address, files, num_bytes.ctypes.data, first, last, views, len(views), scaled, done.ctypes.data
        )

    def render_pixels(self, pixels: npt.NDArray[np.uint8], sample: int, views: ctypes.Array[View]) -> int:
        """Render all views of one sample from its pixels, uint8 (height, width, 3); what became of it."""
        height, width, _ = pixels.shape
        planes = np.empty(pixels.size + _MARGIN, np.uint8)
        planes[: pixels.size].reshape(3, height, width)[...] = pixels.transpose(2, 0, 1)
        worker = self._worker()
        return self._functions.render_pixels(
            worker.address, planes.ctypes.data, width, height, sample, views, len(views)
        )

    def num_decoded(self) -> dict[str, int]:
        """How many files were decoded until now by whom: "kernel", "libjpeg"."""
        by_kernel, by_libjpeg = np.sum(self._num_decoded, axis=0).tolist()
        return {"kernel": by_kernel, "libjpeg": by_libjpeg}

    def _worker(self) -> _Worker:
        if not hasattr(self._workers, "own"):
            counts = np.zeros(2, np.int64)
            self._num_decoded.append(counts)
            instructions = INSTRUCTIONS.index(self.instructions)
            self._workers.own = _Worker(self._functions, self._libjpeg, instructions, self._by_libjpeg, counts)
        return self._workers.own


class _Worker:
    """Memory and decoder of one thread."""

    def __init__(
        self,
        functions: ctypes.CDLL,
        libjpeg: ctypes.Array[c_void_p],
        instructions: int,
        by_libjpeg: bool,
        num_decoded: npt.NDArray[np.int64],
    ) -> None:
        self._functions, self._num_decoded = functions, num_decoded  # C has only its address
        self.address = functions.new_worker(libjpeg, instructions, by_libjpeg, num_decoded.ctypes.data)
        if not self.address:
            raise KernelError("Pillow's libjpeg is another version than the kernel knows; use loader.backend=exact")

    def __del__(self) -> None:
        self._functions.free_worker(self.address)


@functools.cache
def why_not() -> str:
    """Why the kernel cannot be used here, in one sentence with the remedy; "" if it can."""
    try:
        Kernel()
    except KernelError as error:
        return str(error)
    return ""


def source_digest(path: Path = LIBRARY) -> str:
    """What `pipelines.native.build.source_digest` said when the kernel was compiled."""
    return _load(path).source_digest().decode()


def arrays(files: Sequence[bytes]) -> tuple[ctypes.Array[c_char_p], npt.NDArray[np.int64]]:
    """Addresses and sizes of files, for `render_files`; the files must stay alive meanwhile."""
    return (c_char_p * len(files))(*files), np.array([len(file) for file in files], np.int64)


def views_array(views: Sequence[View]) -> ctypes.Array[View]:
    return (View * len(views))(*views)


@functools.cache
def _load(path: Path) -> ctypes.CDLL:
    try:
        functions = ctypes.CDLL(str(path))
    except OSError:
        raise KernelError(
            f"the compiled kernel is not there ({path.name}); install a C compiler, then run"
            " `python -m pipelines.native.build`"
        ) from None
    functions.source_digest.restype = c_char_p
    if functions.size_of_view() != ctypes.sizeof(View):
        raise KernelError("the compiled kernel is an older one; run `python -m pipelines.native.build`")
    functions.new_worker.argtypes = [c_void_p * len(_LIBJPEG), c_int, c_int, c_void_p]
    functions.new_worker.restype = c_void_p
    functions.free_worker.argtypes, functions.free_worker.restype = [c_void_p], None
    functions.render_files.argtypes = [
        c_void_p, POINTER(c_char_p), c_void_p, c_int64, c_int64, POINTER(View), c_int, c_int, c_void_p
    ]  # fmt: skip
    functions.render_files.restype = None
    functions.render_pixels.argtypes = [c_void_p, c_void_p, c_int, c_int, c_int64, POINTER(View), c_int]
    return functions


def _libjpeg() -> ctypes.Array[c_void_p]:
    """libjpeg_t of kernel.h: functions that Pillow's own module is linked against."""
    pillow = ctypes.CDLL(_imaging.__file__)
    try:
        addresses = [ctypes.cast(getattr(pillow, name), c_void_p) for name in _LIBJPEG]
    except AttributeError:
        raise KernelError("this Pillow does not show its libjpeg; install Pillow's own wheel") from None
    return (c_void_p * len(_LIBJPEG))(*addresses)
