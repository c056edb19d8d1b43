"""On paper, not measured: the bytes that each step of the dali backend moves on a GPU, and what an H100 makes of it.

    python -m bench.dali_bound moco_v2 [--width 500 --height 375 --kilobytes 113 --batch 256]

Every read and write is counted as one of HBM, as if no cache held anything between two kernels; what a launch, the JPEG
engines and the bus allow is set beside it. All of it is arithmetic on the assumptions below.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastssl import config
from pipelines.views import ViewSpec, flatten

HBM_BYTES_PER_S = 3.35e12  # H100 SXM, NVIDIA's data sheet
BUS_BYTES_PER_S = 64e9  # PCIe 5.0 x16, one direction
# The data sheet has 7 JPEG engines. For a rate, five engines of an A100 were reported to take 5 ms for five images of
# 3840 x 2160 px (forums.developer.nvidia.com, thread 228533); small images with many bytes a pixel may take longer.
JPEG_PX_PER_S = 7 * 3840 * 2160 / 5e-3
LAUNCH_S = 10e-6  # of the host, a Triton launch from Python; an assumption
LEVELS = 3  # bytes of a pixel
HALF = 6  # bytes of a float16 pixel


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--kilobytes", type=float, default=113.0, help="of a file")
    parser.add_argument("--batch", type=int, default=256, help="images of a GPU")
    options = parser.parse_args(argv)
    specs = config.load([f"method={options.method}", "data.root=none"]).view_specs()
    image_px = options.width * options.height
    steps = bytes_moved(specs, image_px, 1000 * options.kilobytes)
    total = sum(steps.values())
    print("| step | kB per image |\n|---|---|")
    for name, num in steps.items():
        print(f"| {name} | {num / 1000:.0f} |")
    print(f"| **all** | **{total / 1000:.0f}** |\n\n| what would be the limit | images/s |\n|---|---|")
    for name, rate in bounds(specs, image_px, 1000 * options.kilobytes, total, options.batch).items():
        print(f"| {name} | {rate:,.0f} |")
    return 0


def bytes_moved(specs: Sequence[ViewSpec], image_px: int, file_bytes: float) -> dict[str, float]:
    """Step -> bytes read and written per image, on average over what the probabilities of the specs ask for."""
    steps = dict.fromkeys(
        ("decode", "crop", "resize", "mean_luma", "jitter", "blur_rows", "finish", "strong draws"), 0.0
    )
    steps["decode"] = file_bytes + LEVELS * image_px
    for _, spec in flatten(specs):
        augment, view_px = spec.augment, spec.size**2
        crop_px = image_px * sum(spec.scale) / 2 if spec.crop == "random_resized" else image_px
        if spec.crop == "random_resized":
            steps["crop"] += 2 * LEVELS * crop_px
        # Two passes with float32 between them, which is as high or as wide as the crop: here as if it were a square.
        between_px = spec.size * crop_px**0.5
        steps["resize"] += LEVELS * crop_px + 2 * 4 * LEVELS * between_px + LEVELS * view_px
        if augment.contrast > 0:
            steps["mean_luma"] += augment.jitter_p * LEVELS * view_px
        steps["jitter"] += 2 * LEVELS * view_px
        steps["blur_rows"] += augment.blur_p * 2 * LEVELS * view_px
        draws = augment.strong_draws
        steps["finish"] += (LEVELS + (LEVELS if draws else HALF)) * view_px
        if draws:  # of a draw, the table takes three passes for half of 3 of 14 operations
            table = 0.5 * 3 / 14 * LEVELS
            steps["strong draws"] += (draws * (table + 2 * LEVELS) + HALF - LEVELS) * view_px
    return {name: num for name, num in steps.items() if num}


def launches(specs: Sequence[ViewSpec]) -> int:
    """Triton kernels of a batch."""
    views = [spec.augment for _, spec in flatten(specs)]
    return sum(2 + (a.jitter_p * a.contrast > 0) + (a.blur_p > 0) + 2 * a.strong_draws for a in views)


def bounds(specs: Sequence[ViewSpec], image_px: int, file_bytes: float, moved: float, batch: int) -> dict[str, float]:
    """Limit -> images/s if nothing else were one."""
    num = launches(specs)
    return {
        "memory of the GPU": HBM_BYTES_PER_S / moved,
        "JPEG engines": JPEG_PX_PER_S / image_px,
        "bus, files to the GPU": BUS_BYTES_PER_S / file_bytes,
        f"{num} launches a batch of {batch}, by one thread": batch / (num * LAUNCH_S),
    }


if __name__ == "__main__":
    sys.exit(main())
