"""What a packed data set is: a table for people, a document for programs, and the statistics of its pixels."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from shard_tools.census import counted, table
from shard_tools.extract import read_image
from shard_tools.manifest import Manifest, ShardError


def describe(manifest: Manifest) -> dict[str, Any]:
    """One split as plain data; raises ShardError where its index does not fit it."""
    labels = manifest.index()["label"]
    num_classes = len(manifest.classes or ())
    if labels.min() < -1 or labels.max() >= num_classes:
        raise ShardError(f"{manifest.root} has labels without a class; see `shard_tools verify`, and pack it again")
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
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


def pixel_statistics(manifest: Manifest, num_images: int = 1000) -> dict[str, Any]:
    """Mean and standard deviation of each channel, 0 to 1, over a fixed random sample in which every image weighs 1.

    Raises ShardError for a damaged image.
    """
    rows = manifest.index()
    order = np.argsort(np.random.Philox(key=0).random_raw(len(rows)), kind="stable")
    kept = {entry.get("row") for entry in manifest.census.get("bad", [])}
    chosen = [row for row in order.tolist() if row not in kept][:num_images]
    sums, squares = np.zeros(3), np.zeros(3)
    for row in chosen:
        with Image.open(io.BytesIO(read_image(manifest, rows, row))) as image:
            pixels = np.asarray(image.convert("RGB"), np.float32) / 255
        sums += pixels.mean(axis=(0, 1), dtype=np.float64)
        squares += np.square(pixels).mean(axis=(0, 1), dtype=np.float64)
    mean = sums / len(chosen)
    std = np.sqrt(squares / len(chosen) - mean**2)
    return {"num_images": len(chosen), "mean": mean.round(4).tolist(), "std": std.round(4).tolist()}
