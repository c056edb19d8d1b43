"""A simulated survey of galaxies: stamps in five bands with their noise, drawn by GalSim into an HDF5 file.

Each galaxy has a bulge, a disk, or both; some have knots of young stars or a neighbour, so that its mirror image is not
another turn of itself. Sizes, colours, seeing and noise are of the order of the Dark Energy Survey's, but nothing is
fitted to it: for trying the tools, not for astronomy. (GalSim: Rowe et al. 2015, arXiv:1407.7676.)
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shard_tools import disk, progress
from shard_tools.manifest import ShardError
from shard_tools.workers import in_order

BANDS = "grizy"
CLASSES = ("early", "disk", "clumpy")  # mostly bulge; bulge and smooth disk; disk with knots
ARCSEC_PER_PX = 0.263
# One number a band: flux relative to r of old and of young stars, full width of the PSF in arcsec, noise per px where
# a galaxy has a flux of 600 to 12,000 in r.
_OLD = np.array([0.35, 1.0, 1.5, 1.85, 2.0])
_YOUNG = np.array([0.75, 1.0, 1.1, 1.15, 1.2])
_SEEING = np.array([1.25, 1.1, 1.0, 0.95, 0.9])
_NOISE = np.array([0.8, 1.0, 1.4, 2.0, 3.0])


def simulate(path: Path, *, num: int, size: int = 96, seed: int = 0, workers: int = 1) -> None:
    """Write `images` (num, 5, size, size) float32, `labels` and `obj_ids` to the HDF5 file `path`, whole or not at all.

    A galaxy depends on (seed, its number) and on `size` only. Values are sky-subtracted counts: of the empty sky, half
    is below 0. Raises ShardError for impossible numbers, without the packages, or where `path` is there already.
    """
    for key, value, most in (("num", num, 10**7), ("size", size, 1024)):
        if not 1 <= value <= most:
            raise ShardError(f"--{key} is {value}, but must be between 1 and {most}")
    if not 0 <= seed < 2**63:
        raise ShardError(f"--seed is {seed}, but must be at least 0")
    if path.exists():
        raise ShardError(f"{path} is there already; remove it, or give another OUT")
    _galsim()
    import h5py

    with disk.full_disk_explained(path, "make room, or choose another place"):
        partial_path = disk.partial_path(path)
        with h5py.File(partial_path, "w") as file, progress.shown("galaxies", num) as bar:
            images = file.create_dataset("images", (num, len(BANDS), size, size), "<f4")
            labels = file.create_dataset("labels", (num,), "<i4")
            labels.attrs["classes"] = CLASSES
            file["obj_ids"] = np.arange(num)
            file.attrs.update({"bands": BANDS, "seed": seed, "arcsec_per_px": ARCSEC_PER_PX})
            for number, (pixels, label) in enumerate(in_order(partial(galaxy, seed, size), range(num), workers)):
                images[number], labels[number] = pixels, label
                bar.advance(pixels.nbytes)
        disk.put_in_place(path)


def galaxy(seed: int, size: int, number: int) -> tuple[npt.NDArray[np.float32], int]:
    """(pixels (5, size, size), class) of one galaxy."""
    galsim = _galsim()
    rng = np.random.Generator(np.random.Philox(key=[seed, number]))
    # Off by up to 0.002 counts from GalSim's own thresholds, far below the noise, in a third of the time.
    coarse = galsim.GSParams(folding_threshold=0.05, maxk_threshold=0.05, kvalue_accuracy=1e-4)
    label = int(rng.choice(3, p=[0.3, 0.3, 0.4]))
    old, young = _components(galsim, rng, coarse, label)
    if rng.random() < 0.5:  # a neighbour, or a galaxy far behind
        angle, distance = rng.uniform(0, 2 * math.pi), rng.uniform(0.22, 0.42) * size * ARCSEC_PER_PX
        other = galsim.Exponential(rng.uniform(0.3, 0.9), flux=10 ** rng.uniform(2, 3), gsparams=coarse)
        other = _tilted(galsim, rng, other).shift(distance * math.cos(angle), distance * math.sin(angle))
        young, old = (young + other, old) if rng.random() < 0.5 else (young, old + other)
    slope, scatter = rng.normal(0, 0.2, (2, 1)), rng.normal(0, 0.03, (2, len(BANDS)))
    tint_old, tint_young = np.exp(slope * np.linspace(-1, 1, len(BANDS)) + scatter)
    sharpness = rng.uniform(0.85, 1.15)
    pixels = rng.normal(0, 1, (len(BANDS), size, size)) * _NOISE[:, None, None]
    for band in range(len(BANDS)):
        light = old * (_OLD[band] * tint_old[band]) + young * (_YOUNG[band] * tint_young[band])
        psf = galsim.Moffat(beta=3, fwhm=_SEEING[band] * sharpness, gsparams=coarse)
        seen = galsim.Convolve(light, psf, gsparams=coarse)
        pixels[band] += seen.drawImage(nx=size, ny=size, scale=ARCSEC_PER_PX, method="no_pixel", dtype=float).array
    return pixels.astype(np.float32), label


def _components(galsim: Any, rng: np.random.Generator, coarse: Any, label: int) -> tuple[Any, Any]:
    """Light of old and of young stars; fluxes add up to that in the r band."""
    flux, radius = 10 ** rng.uniform(2.8, 4.1), rng.uniform(0.9, 3.3)  # radius: of half the light, in arcsec
    share = {0: rng.uniform(0.7, 0.95), 1: rng.uniform(0.1, 0.5), 2: rng.uniform(0.0, 0.25)}[label]  # of the bulge
    angle, shape = rng.uniform(0, math.pi) * galsim.radians, rng.uniform(0.25, 1.0)  # of the disk: axis ratio
    bulge = galsim.DeVaucouleurs(half_light_radius=0.5 * radius, flux=flux * share, gsparams=coarse)
    bulge = bulge.shear(q=max(shape, rng.uniform(0.6, 1.0)), beta=angle)
    smooth = galsim.Exponential(half_light_radius=radius, flux=flux * (1 - share), gsparams=coarse)
    if label == 2:
        deviate = galsim.BaseDeviate(int(rng.integers(1, 2**31)))
        num_knots, in_knots = int(rng.integers(6, 20)), rng.uniform(0.25, 0.55)
        knots = galsim.RandomKnots(num_knots, profile=smooth, rng=deviate, gsparams=coarse)
        smooth = smooth * (1 - in_knots) + knots * in_knots
    return bulge, smooth.shear(q=shape, beta=angle)


def _tilted(galsim: Any, rng: np.random.Generator, light: Any) -> Any:
    return light.shear(q=rng.uniform(0.4, 1.0), beta=rng.uniform(0, math.pi) * galsim.radians)


def _galsim() -> Any:
    try:
        import galsim
        import h5py  # noqa: F401
    except ImportError as error:
        raise ShardError(
            f"simulating galaxies needs {error.name}; run `pip install 'fastssl-train[astronomy]'`"
        ) from None
    return galsim
