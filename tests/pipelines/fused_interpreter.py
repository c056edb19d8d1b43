"""Renders views by backends/fused_colour.py on a CPU, under Triton's interpreter.

In a process of its own, `python -m tests.pipelines.fused_interpreter CASES.pickle VIEWS.npz`: Triton looks at
TRITON_INTERPRET when it is imported, and with it set no other test could compile a kernel.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from pipelines.draw import ViewDraws
from pipelines.views import ViewSpec


@dataclass(frozen=True)
class Case:
    """pixels: uint8 (B, S, S, 3), what is cropped and flipped; block: pixels a program of a kernel works on."""

    spec: ViewSpec
    draws: ViewDraws
    pixels: npt.NDArray[np.uint8]
    output: str = "uint8"
    block: int = 4096


def render(cases: Mapping[str, Case], folder: Path) -> dict[str, npt.NDArray[np.generic]]:
    """Name -> views (B, S, S, 3)."""
    given, made = folder / "cases.pickle", folder / "views.npz"
    given.write_bytes(pickle.dumps(dict(cases)))
    command = [sys.executable, "-m", "tests.pipelines.fused_interpreter", str(given), str(made)]
    subprocess.run(command, check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2])
    with np.load(made) as views:
        return dict(views)


def main(given: Path, made: Path) -> None:
    from pipelines.backends.fused_colour import FusedColour

    views = {}
    for name, case in pickle.loads(given.read_bytes()).items():
        colour = FusedColour([case.spec], torch.device("cpu"), case.output, case.block)
        (view,) = colour([torch.from_numpy(case.pixels)], [case.draws])
        assert view.is_contiguous(memory_format=torch.channels_last)
        views[name] = view.permute(0, 2, 3, 1).numpy()
    np.savez(made, **views)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
