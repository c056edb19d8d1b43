"""Which images to label next: a reproducible list of `budget` of them, chosen by features alone (see strategies.py).

The entropy of an image is that of its softmax over the clusters (strategies.assign), in nats, or, with
evaluator.entropy=grey_levels, that of the histogram of its own 256 grey levels, in bits. All distances are between
features on the unit sphere. One thread chooses, and every rank by itself, so that nothing but the last bits of the
features could change the list: k-means costs N * clusters * D a round, `edges` N * budget * D in all.
"""

# N images, D feature width
from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastssl import dist
from fastssl.evaluate import gallery
from fastssl.evaluate.features import Features
from fastssl.evaluate.strategies import (
    STRATEGIES,
    Array,
    Choice,
    Pool,
    assign,
    choose,
    expected_classes,
    k_means,
    nearest,
    random,
    split_budget,
)
from fastssl.evaluate.task import Report, Task
from fastssl.settings import require
from fastssl.stamp_pictures import light
from pipelines.views import ViewSpec
from shard_tools.documents import MAX_LIST_BYTES, read_limited
from shard_tools.extract import original_name
from shard_tools.manifest import Manifest

MOST_CLUSTERS = 1000  # where evaluator.clusters leaves it open
SHEET_COLUMNS = 12


@dataclass(frozen=True)
class SelectSettings:
    """How many images, and how they are chosen (see the head of the file).

    shares      of the budget, for `mixed` alone; they need not add up to 1
    clusters    of k-means; 0 takes the budget, 1000 at most
    temperature of the softmax over squared distances, in units of their mean to the nearest centre
    exclude     a file of samples that have labels already, an id or an original name a line; "" for none
    sheet       images of each strategy on the contact sheet; 0 draws none
    """

    name: Literal["select"]
    budget: int
    strategy: Literal["centers", "edges", "low_entropy", "high_entropy", "spectrum", "random", "mixed"] = "centers"
    shares: dict[str, float] = field(default_factory=dict)
    clusters: int = 0
    temperature: float = 0.3
    entropy: Literal["clusters", "grey_levels"] = "clusters"
    exclude: str = ""
    sheet: int = 96

    def __post_init__(self) -> None:
        require(self.budget >= 1, "evaluator.budget", self.budget, "1 or more")
        require(self.clusters >= 0, "evaluator.clusters", self.clusters, "0 (as the budget) or more")
        require(self.temperature > 0, "evaluator.temperature", self.temperature, "above 0")
        require(self.sheet >= 0, "evaluator.sheet", self.sheet, "0 (no contact sheet) or more")
        sound = not set(self.shares) - set(STRATEGIES) and all(share >= 0 for share in self.shares.values())
        one_counts = self.strategy != "mixed" or any(self.shares.values())
        require(
            sound and one_counts, "evaluator.shares", self.shares,
            f"shares of {', '.join(STRATEGIES)}, 0 or more each and one above 0",
        )  # fmt: skip

    def counts(self) -> dict[str, int]:
        """How many images each strategy chooses, in the order in which they choose; they add up to the budget."""
        if self.strategy != "mixed":
            return {self.strategy: self.budget}
        return split_budget(self.budget, {name: self.shares.get(name, 0.0) for name in STRATEGIES})


class GreyLevels(nn.Module):
    """A backbone whose one feature is the entropy, in bits, of the 256 grey levels of the image as `view` shows it.

    Of photographs ITU-R 601 luma, as Pillow's mode L; of stamps the mean of the bands on the scale of their pictures.
    """

    num_features = 1

    def __init__(self, view: ViewSpec, is_stamp: bool) -> None:
        super().__init__()
        self.view, self.is_stamp = view, is_stamp

    def forward(self, images: Tensor) -> Tensor:
        levels = (self._of_stamps if self.is_stamp else self._of_photographs)(images.float().cpu())
        counts = torch.stack([torch.bincount(image.flatten(), minlength=256) for image in levels])
        shares = counts.double() / counts.sum(1, keepdim=True)
        return torch.special.entr(shares).sum(1, keepdim=True).float() / math.log(2)

    def _of_photographs(self, images: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (self.view.augment.mean, self.view.augment.std)
        )
        red, green, blue = ((images * std + mean) * 255).round().long().unbind(1)
        return (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16

    def _of_stamps(self, images: Tensor) -> Tensor:
        grey = light(images, self.view).mean(1)
        scale = grey.flatten(1).quantile(0.995, dim=1).clamp(min=1e-6)[:, None, None]
        return (torch.asinh(10 * grey / scale) / math.asinh(10)).clamp(0, 1).mul(255).round().long()


def excluded_ids(file: str, manifest: Manifest) -> set[int]:
    """The samples that a list names: an id, an original name or the last part of one a line; a line of digits is an id.

    Raises ValueError if the list cannot be read, or names what the split does not hold.
    """
    if not file:
        return set()
    try:
        lines = read_limited(Path(file), MAX_LIST_BYTES).decode("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise ValueError(f"evaluator.exclude is {file!r}, which cannot be read ({error.strerror})") from None
    wanted = [line.strip() for line in lines if line.strip()]
    ids = {int(line) for line in wanted if line.isascii() and line.isdigit()}
    if ids and max(ids) >= manifest.num_samples:
        raise ValueError(f"{file} names sample {max(ids)}, but {manifest.place} ends at {manifest.num_samples - 1}")
    names = {line for line in wanted if not (line.isascii() and line.isdigit())}
    if not names:
        return ids
    index, found = manifest.index(), set()
    for row in range(manifest.num_samples):
        name = original_name(manifest, index, row)
        if matching := names & {name, name.rpartition("/")[2]}:
            found |= matching
            ids.add(row)
    if missing := names - found:
        raise ValueError(
            f"{file} names {len(missing)} samples that {manifest.place} does not hold, such as {min(missing)!r}; give"
            f" ids, or names as the .json members have them"
        )
    return ids


def evaluate_select(task: Task, settings: SelectSettings) -> Report:
    try:
        from threadpoolctl import threadpool_limits  # comes with scikit-learn
    except ModuleNotFoundError as error:
        raise ValueError("evaluator=select needs scikit-learn; install fastssl-train[eval]") from error
    path = task.result_path(settings.name)
    if path is None:
        raise ValueError(f"checkpoint={task.cfg.checkpoint} has no run to put the list beside; give eval.out=FOLDER")
    excluded = excluded_ids(settings.exclude, task.train)
    features = task.features(task.train)
    is_free = torch.tensor([sample not in excluded for sample in features.ids.tolist()])
    candidates, labelled = features.subset(is_free), features.subset(~is_free)
    require(
        settings.budget <= len(candidates), "evaluator.budget", settings.budget,
        f"at most the {len(candidates):,} images of {task.train.place} that are not excluded",
    )  # fmt: skip
    grey = None
    if settings.entropy == "grey_levels":
        grey = task.features(task.train, GreyLevels(task.subject.view, bool(task.train.bands))).subset(is_free)
    with threadpool_limits(1):
        pool = _pool(candidates, labelled, grey, settings, task.cfg.run.seed)
        chosen = choose(pool, settings.counts())
        by_chance, _ = random(pool, np.ones(len(candidates), bool), settings.budget)
        reach = [_reach(pool, rows) for rows in ([c.row for c in chosen], by_chance)]
    files = _write(task, candidates, chosen, settings, path) if dist.rank() == 0 else []
    metrics = {f"select/{key}{of}": reach[i][key] for i, of in enumerate(("", "_random")) for key in reach[i]}
    classes, rows = _coverage(candidates.labels, chosen, settings, reach)
    return Report(
        metrics | classes,
        _protocol(task, settings, features, len(labelled)),
        ("chosen by", "images", "classes among them", "mean distance to the nearest", "largest distance"),
        rows,
        {"selected": [int(candidates.ids[c.row]) for c in chosen], "files": files},
    )


def _pool(candidates: Features, labelled: Features, grey: Features | None, settings: SelectSettings, seed: int) -> Pool:
    points, known = (nn.functional.normalize(part.features, dim=1).numpy() for part in (candidates, labelled))
    none = np.zeros(0)
    cluster, distance, entropy = none, none, none
    by_clusters = {"centers"} if grey is not None else set(STRATEGIES) - {"edges", "random"}
    if by_clusters & set(settings.counts()):
        num_clusters = settings.clusters or min(settings.budget, MOST_CLUSTERS)
        require(
            num_clusters <= len(points), "evaluator.clusters", num_clusters, f"at most the {len(points):,} candidates"
        )
        cluster, distance, entropy = assign(points, k_means(points, num_clusters, seed), settings.temperature)
    if grey is not None:
        entropy = grey.features[:, 0].double().numpy()
    return Pool(points, known, seed, cluster, distance, entropy)


def _reach(pool: Pool, rows: Array | list[int]) -> dict[str, float]:
    """How far the candidates are from the nearest image that has a label, or will have one."""
    apart = nearest(pool.points, np.concatenate([pool.labelled, pool.points[rows]]))
    return {"mean_distance": float(apart.mean()), "largest_distance": float(apart.max())}


def _coverage(
    labels: Tensor, chosen: Sequence[Choice], settings: SelectSettings, reach: Sequence[dict[str, float]]
) -> tuple[dict[str, float], list[tuple[str, ...]]]:
    """Metrics of the classes found, {} where there are no labels, and the rows of the table."""
    sizes = labels[labels >= 0].bincount()
    present = int((sizes > 0).sum())

    def held(rows: Iterable[int]) -> int:
        found = labels[list(rows)]
        return len(found[found >= 0].unique())

    def of_all(number: float) -> str:
        return f"{number:.4g} of {present}" if present else ""

    counts, num = settings.counts(), str(settings.budget)
    parts = {name: held(c.row for c in chosen if c.strategy == name) for name in counts}
    found, by_chance = held(c.row for c in chosen), expected_classes(sizes.tolist(), len(labels), settings.budget)
    rows: list[tuple[str, ...]] = []
    if len(counts) > 1:
        rows = [(name, str(count), of_all(parts[name]), "", "") for name, count in counts.items()]
    for name, number, lengths in zip((settings.strategy, "chance"), (found, by_chance), reach):
        rows.append((name, num, of_all(number), *(f"{length:.4f}" for length in lengths.values())))
    if not present:
        return {}, rows
    return {"select/classes_covered": found / present, "select/classes_covered_random": by_chance / present}, rows


def _protocol(task: Task, settings: SelectSettings, features: Features, num_labelled: int) -> str:
    how = {
        "clusters": f"entropy over the clusters at temperature {settings.temperature:g}",
        "grey_levels": "entropy of the grey levels",
    }[settings.entropy]
    kinds = ", ".join(f"{count} {name}" for name, count in settings.counts().items())
    return (
        f"{settings.budget:,} of {len(features) - num_labelled:,} images of {task.train.split} ({kinds}), "
        f"{num_labelled:,} excluded; seed {task.cfg.run.seed}; distances of unit rows of {features.features.shape[1]} "
        f"features of {task.subject.label}, {task.cfg.run.precision}, centre crop {task.subject.view.size} px; {how}; "
        "chance is one draw by the seed and, for classes, the exact mean over all draws"
    )


def _write(
    task: Task, candidates: Features, chosen: Sequence[Choice], settings: SelectSettings, path: Path
) -> list[str]:
    """The table, the lists and the sheet beside the result file; returns their names.

    Raises ValueError rather than replace a table or list that holds another selection: somebody may be labelling it.
    """
    manifest, index = task.train, task.train.index()
    ids = [int(candidates.ids[choice.row]) for choice in chosen]
    names = [_usable(original_name(manifest, index, i)) for i in ids]
    texts = {"keys.txt": "".join(f"{i}\n" for i in ids)}
    if all(names):
        texts["names.txt"] = "".join(f"{name}\n" for name in names)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("rank", "id", "member", "name", "strategy", "score", "cluster"))
    for rank, (choice, sample, name) in enumerate(zip(chosen, ids, names), 1):
        score = "" if math.isnan(choice.score) else f"{choice.score:.6g}"
        cluster = "" if choice.cluster < 0 else choice.cluster
        writer.writerow((rank, sample, manifest.member_name(sample), name, choice.strategy, score, cluster))
    texts["list.csv"] = table.getvalue()
    stem = f"{path.stem}-{settings.strategy}-{settings.budget}"
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {path.with_name(f"{stem}-{end}"): text.encode(errors="surrogateescape") for end, text in texts.items()}
    for file, content in files.items():
        if file.is_file() and file.read_bytes() != content:
            raise ValueError(f"{file} holds another selection already; give eval.out=FOLDER, or remove that file")
    for file, content in files.items():
        file.write_bytes(content)
    if settings.sheet:
        files[path.with_name(f"{stem}-sheet.png")] = b""
        gallery.save(contact_sheet(manifest, ids, chosen, settings), path.with_name(f"{stem}-sheet.png"))
    return sorted(file.name for file in files)


def _usable(name: str) -> str:
    """The name if a line of a list can hold it, else ""; shards that others packed may say anything."""
    try:
        name.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return ""
    return name if name.splitlines() == [name.strip()] else ""


def contact_sheet(
    manifest: Manifest, ids: Sequence[int], chosen: Sequence[Choice], settings: SelectSettings
) -> Image.Image:
    """The first `settings.sheet` images of each strategy, with id, class where there is one, and score."""
    rows = []
    for name in settings.counts():
        of_it = [(sample, c.score) for sample, c in zip(ids, chosen) if c.strategy == name]
        shown = of_it[: settings.sheet]
        title = (name.replace("_", " "), f"{len(shown):,} of {len(of_it):,}")
        for first in range(0, len(shown), SHEET_COLUMNS):
            part = shown[first : first + SHEET_COLUMNS]
            images = gallery.thumbnails(manifest, [sample for sample, _ in part])
            cells = [
                gallery.Cell(
                    image, (f"{sample} {gallery.class_of(manifest, sample)}"[: gallery.WIDEST - 2], _score(score))
                )
                for image, (sample, score) in zip(images, part)
            ]
            rows.append(gallery.Row(title if not first else (), tuple(cells)))
    return gallery.draw_sheet(rows, f"{settings.budget:,} images to label next: id, class where it is known, score")


def _score(score: float) -> str:
    return "" if math.isnan(score) else f"{score:.3g}"
