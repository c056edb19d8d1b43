"""Compile the kernel: `python -m pipelines.native.build`. Runs at installation too, so it needs no other package.

views.c and strong.c are compiled once for each instruction set; which one runs is decided when the kernel is loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARY = HERE / "libviews.so"

# Without contraction, `a * b + c` rounds twice as it does in Pillow; where one rounding is meant, the code says FMA.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
         "-fno-trapping-math", "-fno-signed-zeros", "-ffinite-math-only", "-Wall", "-Wextra")  # fmt: skip
INSTRUCTIONS = {
    "plain": (),
    "avx2": ("-mavx2", "-mfma", "-mbmi2"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mbmi2", "-mprefer-vector-width=512"),
}


class BuildError(RuntimeError):
    """There is no compiler, or it refused; the message is one sentence with the remedy."""


def source_digest() -> str:
    """sha256 of what the kernel is compiled from: sources, headers and this file."""
    sources = sorted([*HERE.glob("*.c"), *HERE.glob("*.h"), HERE / "build.py"])
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in sources)).hexdigest()


def build(library: Path = LIBRARY, extra_flags: Sequence[str] = ()) -> None:
    """Write `library`, whole or not at all. Raises BuildError."""
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if not compiler:
        raise BuildError("there is no C compiler; install one (Debian: apt install gcc libc6-dev) and install again")
    x86 = platform.machine() in ("x86_64", "AMD64")
    flags = [*FLAGS, *extra_flags, f'-DSOURCE_DIGEST="{source_digest()}"', *(["-DHAVE_AVX"] if x86 else [])]
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        objects = []

        def compile_one(source: str, name: str, *more: str) -> None:
            objects.append(f"{folder}/{name}.o")
            _run([compiler, *flags, *more, "-c", str(HERE / source), "-o", objects[-1]])

        for source in ("kernel", "libjpeg"):
            compile_one(f"{source}.c", source)
        for name, options in INSTRUCTIONS.items():
            if x86 or not options:
                for source in ("views", "strong"):
                    compile_one(f"{source}.c", f"{source}-{name}", f"-DFOR={name}", *options)
        if x86:
            compile_one("baseline.c", "baseline")
            compile_one("scan.c", "scan", *INSTRUCTIONS["avx2"])
        _run([compiler, "-shared", *extra_flags, *objects, "-lm", "-o", f"{folder}/libviews.so"])
        os.replace(f"{folder}/libviews.so", library)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"the C compiler refused: {' '.join(command)}\n{done.stderr}")


if __name__ == "__main__":
    try:
        build()
    except BuildError as error:
        sys.exit(f"error: {error}")
