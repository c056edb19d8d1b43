"""What a packed data set is: a table for people, a document for programs, and the statistics of its pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from shard_tools import progress
from shard_tools.census import counted, table
from shard_tools.extract import read_image
from shard_tools.headers import FORMATS
from shard_tools.manifest import Manifest, ShardError
from shard_tools.workers import in_order

_TASK_IMAGES = 64


def describe(manifest: Manifest) -> dict[str, Any]:
    """One split as plain data; raises ShardError where its index does not fit it."""
    labels = manifest.index()["label"]
    num_classes = len(manifest.classes or ())
    if labels.min() < -1 or labels.max() >= num_classes:
        raise ShardError(f"{manifest.place} has labels without a class; see `shard_tools verify`, and pack it again")
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    if manifest.multi_label:
        counts = (manifest.labels() == 1).sum(axis=0)
    return {
        "split": manifest.split,
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.shards),
        "num_bytes": sum(shard.num_bytes for shard in manifest.shards),
        "num_classes": None if manifest.classes is None else len(manifest.classes),
        "samples_per_class": [int(counts.min()), int(counts.max())] if num_classes else None,
        "digest": manifest.digest,
        "source": manifest.source,
        "options": manifest.options,
        "census": manifest.census,
    }


def lines(document: dict[str, Any]) -> list[str]:
    """What `describe` returned, for people."""
    per_class = document["samples_per_class"]
    classes = f"{document['num_classes']}, {per_class[0]} to {per_class[1]} images each" if per_class else "none"
    images = counted(document["num_samples"], "image")
    shards = f"{counted(document['num_shards'], 'shard')}, {document['num_bytes'] / 1e6:.1f} MB"
    return [
        f"{document['split']}: {images} in {shards}, from {document['source'].get('kind')}",
        f"  classes    {classes}",
        *table(document["census"]),
        f"  digest     {document['digest'][:16]}",
    ]


def pixel_statistics(manifest: Manifest, *, limit: int = 0, workers: int = 1) -> dict[str, Any]:
    """Mean and standard deviation of each channel, from 0 to 1, over all pixels of all images as RGB.

    Every pixel weighs the same, so that a large image weighs more than a small one. Exact: the values are counted, and
    the result does not depend on `workers`. Images that were packed although they do not decode are left out.

    limit   measure only so many images, a fixed random choice; 0 for all
    Raises ShardError for a damaged image, and for stamps.
    """
    if manifest.census.get("bands"):
        raise ShardError(f"{manifest.place} holds stamps, but --stats is for photographs; leave it out")
    if limit < 0:
        raise ShardError(f"--limit is {limit}, but must be a number of images, or 0 for all")
    kept = {entry.get("row") for entry in manifest.census.get("bad", [])}
    # Not NumPy's Generator, whose choices may differ in its next version.
    shuffled = np.argsort(np.random.Philox(key=0).random_raw(manifest.num_samples), kind="stable").tolist()
    chosen = sorted([row for row in shuffled if row not in kept][: limit or None])  # in the order of the disk
    if not chosen:
        raise ShardError(f"{manifest.place} has no image that decodes; pack the split again")
    tasks = [chosen[first : first + _TASK_IMAGES] for first in range(0, len(chosen), _TASK_IMAGES)]
    counts = np.zeros((3, 256), np.int64)
    with progress.shown(manifest.split, len(chosen)) as bar:
        results = in_order(partial(_count_values, manifest), tasks, workers, chunk=1)
        for task, (counted_here, num_bytes) in zip(tasks, results):
            counts += counted_here
            bar.advance(num_bytes, len(task))
    values, num_pixels = np.arange(256) / 255, counts[0].sum()
    mean = counts @ values / num_pixels
    std = np.sqrt((counts * np.square(values - mean[:, None])).sum(axis=1) / num_pixels)
    return {
        "num_images": len(chosen),
        "num_pixels": int(num_pixels),
        "mean": mean.round(6).tolist(),
        "std": std.round(6).tolist(),
    }


def pixel_lines(pixels: dict[str, Any]) -> list[str]:
    """What `pixel_statistics` returned, and the settings of a training with it."""
    mean, std = (",".join(f"{value:.4f}" for value in pixels[key]) for key in ("mean", "std"))
    return [
        f"  pixels     {pixels['num_pixels']} of {counted(pixels['num_images'], 'image')}; for training:",
        f"data.mean=[{mean}] data.std=[{std}]",
    ]


def _count_values(manifest: Manifest, rows: Sequence[int]) -> tuple[np.ndarray, int]:
    """In a worker: how often each of the values 0..255 occurs in each channel (3, 256), and the bytes read."""
    index = manifest.index()
    counts = np.zeros((3, 256), np.int64)
    for row in rows:
        payload = read_image(manifest, index, row)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's on odd metadata; `verify --decode` judges files
                counts += np.reshape(
                    Image.open(io.BytesIO(payload), formats=FORMATS).convert("RGB").histogram(), (3, 256)
                )
        except Exception as error:  # whatever a decoder raises on damaged bytes
            raise ShardError(
                f"{manifest.member_name(row)} cannot be decoded ({error}); pack the data again with --on-bad quarantine"
            ) from None
    return counts, int(index["size"][rows].sum())
