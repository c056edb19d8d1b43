"""Similarity placement: of all images, is a mirrored copy the one most similar to its original?

The measure of MoCo with a decoder on galaxies: a galaxy mirrored is the same galaxy, but no training view shows it
mirrored. For each image i and each mirroring, the placement is the number of original images, itself included, that
lie nearer to i than its own mirrored copy. 1 is perfect (itself, at distance 0, is always nearer); 0 is an exact copy.
Departures from the published notebooks: eval mode (theirs ran batch norm in train mode), and numbers instead of a
histogram whose first bin of forty ranks was called the first place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from fastssl import dist
from fastssl.evaluate import gallery
from fastssl.evaluate.features import Features
from fastssl.evaluate.settings import PlacementSettings
from fastssl.evaluate.task import Report, Task, percent
from shard_tools.manifest import Manifest

# N images, D width of the codes

MIRRORINGS = {"left_right": (-1,), "up_down": (-2,), "both": (-2, -1)}  # dimensions of (B, C, S, S)
TURNS = {  # the same on pictures
    "left_right": Image.Transpose.FLIP_LEFT_RIGHT,
    "up_down": Image.Transpose.FLIP_TOP_BOTTOM,
    "both": Image.Transpose.ROTATE_180,
}
Metric = Literal["l1", "l2", "cosine"]


@dataclass(frozen=True)
class Placed:
    """Shares and ranks of the placements of one mirroring, or of all; placements int64 (N,)."""

    placements: Tensor

    @property
    def first(self) -> float:
        """The share whose mirrored copy is nearer than any other image."""
        return (self.placements <= 1).double().mean().item()

    def summary(self) -> dict[str, float]:
        ranks = self.placements.clamp(min=1).double()
        return {
            "first": self.first,
            "median": ranks.median().item(),
            "mean": ranks.mean().item(),
            "max": ranks.max().item(),
            "mrr": (1 / ranks).mean().item(),
        }


class Mirrored(nn.Module):
    """A backbone that sees its images mirrored along `dims`."""

    def __init__(self, backbone: nn.Module, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone, self.dims = backbone, dims
        self.num_features = backbone.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone(images.flip(self.dims))


def placements(codes: Tensor, mirrored: Tensor, metric: Metric = "l1", chunk: int = 256) -> Tensor:
    """int64 (N,): how many of `codes` lie strictly nearer to code i than `mirrored[i]` does; both (N, D).

    Memory grows with chunk * N, never with N * N. Distances are those of float64.
    """
    codes, mirrored = codes.double(), mirrored.double()
    if metric == "cosine":
        codes, mirrored = nn.functional.normalize(codes, dim=1), nn.functional.normalize(mirrored, dim=1)
    found = []
    for mine, own_copy in zip(codes.split(chunk), mirrored.split(chunk)):
        if metric == "cosine":
            apart, own = 1 - mine @ codes.T, 1 - (mine * own_copy).sum(1)
        else:
            p = 1.0 if metric == "l1" else 2.0
            apart = torch.cdist(mine, codes, p, compute_mode="donot_use_mm_for_euclid_dist")
            own = torch.linalg.vector_norm(mine - own_copy, ord=p, dim=1)
        found.append((apart < own[:, None]).sum(1))
    return torch.cat(found)


def most_similar(codes: Tensor, queries: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """The rows of `codes` (N, D) with the highest cosines to each row named by `queries` (Q,), but not that row itself.

    Returns rows and cosines, both (Q, num), best first; equal ones in the order of the rows; num at most N - 1.
    """
    unit = nn.functional.normalize(codes.double(), dim=1)
    cosines = unit[queries] @ unit.T
    cosines[torch.arange(len(queries)), queries] = -torch.inf
    found = cosines.sort(dim=1, descending=True, stable=True)
    return found.indices[:, :num], found.values[:, :num]


def chosen_queries(worst: Tensor, num: int, seed: int) -> tuple[list[int], list[int]]:
    """Two disjoint lists of rows, `num` together: half drawn by the seed, and those with the largest `worst` (N,)."""
    drawn = dist.permutation(len(worst), seed, 0)[: (num + 1) // 2].tolist()
    order = worst.sort(descending=True, stable=True).indices.tolist()
    return drawn, [row for row in order if row not in drawn][: num // 2]


def draw_gallery(
    manifest: Manifest, bank: Features, placed: dict[str, Tensor], settings: PlacementSettings, seed: int
) -> Image.Image:
    """A row a query: the image, its mirrored copies with their placements, the most similar images with cosines."""
    codes, ids = bank.features, bank.ids.tolist()
    worst = torch.stack(list(placed.values())).amax(0)
    drawn, misplaced = chosen_queries(worst, settings.gallery, seed)
    queries = drawn + misplaced
    neighbours, cosines = most_similar(codes, torch.tensor(queries), min(settings.neighbours, len(codes) - 1))
    rows = []
    for query, near, similar in zip(queries, neighbours.tolist(), cosines.tolist()):
        sample, *samples = (ids[row] for row in [query, *near])
        image, *others = gallery.thumbnails(manifest, [sample, *samples])
        cells = [gallery.Cell(image, ("the image",))]
        for name, ranks in placed.items():
            turned = image.transpose(TURNS[name])
            cells.append(gallery.Cell(turned, (name.replace("_", "-"), f"placed {int(ranks[query]):,}")))
        for other, found, cosine in zip(others, samples, similar):
            kind = gallery.shortened(gallery.class_of(manifest, found) or str(found))
            cells.append(gallery.Cell(other, (kind, f"cosine {cosine:.3f}")))
        why = "drawn at random" if query in drawn else "placed worst"
        rows.append(gallery.Row((str(sample), gallery.class_of(manifest, sample), why), tuple(cells)))
    return gallery.draw_sheet(
        rows, f"mirrored copies, placed by {settings.metric} among {len(codes):,} images, and the most similar images"
    )


def draw_histogram(placed: dict[str, Tensor], num_images: int, out: Path, title: str) -> None:
    """Placements of each mirroring on logarithmic axes. Raises ValueError if matplotlib is not there."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError(
            "a histogram needs matplotlib; install fastssl-train[demo], or set evaluator.picture=false"
        ) from error
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    # Whole numbers, one bin each at first and wider and wider later; a bin i holds the placements from i on.
    edges = sorted(
        {round(10 ** (step / 12)) for step in range(round(12 * math.log10(num_images)) + 1)} | {num_images + 1}
    )
    axes.hist(
        [ranks.clamp(min=1).numpy() for ranks in placed.values()],
        bins=edges,
        label=[n.replace("_", "-") for n in placed],
    )
    axes.set(xscale="log", xlabel=f"placement of the mirrored copy among {num_images:,}", ylabel="images", title=title)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def evaluate_placement(task: Task, settings: PlacementSettings) -> Report:
    bank = task.features(task.train)
    codes = bank.features
    placed = {}
    for name, dims in MIRRORINGS.items():
        mirrored = task.features(task.train, Mirrored(task.subject.backbone, dims))
        placed[name] = placements(codes, mirrored.features, settings.metric)
    summaries = {name: Placed(ranks).summary() for name, ranks in placed.items()}
    summaries["all"] = Placed(torch.cat(list(placed.values()))).summary()
    path = task.result_path(settings.name)
    if settings.picture and path is not None and dist.rank() == 0:
        run = task.subject.run_dir
        title = f"{run.name}: {task.subject.label}" if run else task.subject.label
        draw_histogram(placed, len(codes), path.with_suffix(".png"), title)
        if settings.gallery and len(codes) > 1:
            sheet = draw_gallery(task.train, bank, placed, settings, task.cfg.run.seed)
            gallery.save(sheet, path.with_name(f"{path.stem}-gallery.png"))
    view = task.subject.view
    return Report(
        {f"placement/{key}": value for key, value in summaries["all"].items()},
        f"placement of mirrored copies by {settings.metric} distance among {len(codes):,} images of "
        f"{task.train.split}, 1 is nearest; {codes.shape[1]} features of {task.subject.label}, "
        f"{task.cfg.run.precision}, {view.size} px",
        ("mirrored", "in first place", "median", "mean", "max", "mean 1/rank"),
        [
            (
                n.replace("_", "-"),
                percent(s["first"]),
                f"{s['median']:g}",
                f"{s['mean']:.1f}",
                f"{s['max']:g}",
                f"{s['mrr']:.4f}",
            )
            for n, s in summaries.items()
        ],
        {"mirrorings": summaries},
    )
