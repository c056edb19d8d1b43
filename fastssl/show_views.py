"""A picture of the views that training sees: `fastssl-views method=moco_v2 data.root=SHARDS views.ids=[0,1]`.

Views are a pure function of (seed, epoch, sample, view), so nothing has to be recorded to show any of them again.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastssl import config
from fastssl.settings import require
from fastssl.stamp_pictures import colours, light, picture, scale_of, to_image
from pipelines import backends, strong
from pipelines.bad_samples import header_fault
from pipelines.draw import ViewDraws, draw_view
from pipelines.reader import Reader, whole
from pipelines.views import ViewSpec, flatten
from shard_tools.headers import FORMATS
from shard_tools.manifest import Manifest
from shard_tools.stamps import decode

HELP = """
fastssl-views: a picture of the augmented views, one row a sample: the original with its crops marked, then each view

  fastssl-views method=moco_v2 data.root=SHARDS views.ids=[0,1,2] views.epoch=7 views.out=grid.png

  views.ids=[0,1,2]        sample ids, the numbers in the names inside the shards
  views.epoch=0            the epoch, from 0, whose views to show
  views.out=views.png      the picture
  all other settings are those of fastssl-train (recipe=..., run.seed=..., views.query.size=..., loader.backend=...):
  give the same ones to see what that run sees
exit codes: 0 done, 2 a setting or the data is wrong
"""

OWN = ("views.ids", "views.epoch", "views.out")
COLOURS = (  # as many as CLSA has views
    "#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf",
    "#bcbd22", "#e377c2", "#8c564b", "#7f7f7f", "#000080",
)  # fmt: skip
CELL_PX = 112  # views smaller than this are enlarged by a whole factor, so that their pixels stay visible as they are
GAP_PX, TITLE_PX, LABEL_PX, LINE_PX = 8, 34, 96, 14


@dataclass(frozen=True)
class ShowConfig:
    ids: tuple[int, ...]
    epoch: int
    out: str

    def __post_init__(self) -> None:
        require(bool(self.ids) and min(self.ids) >= 0, "views.ids", list(self.ids), "sample ids such as [0,1,2]")
        require(self.epoch >= 0, "views.epoch", self.epoch, "0 or more")
        require(
            Path(self.out).suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"),
            "views.out", self.out, "a file name that ends in .png, .jpg or .webp",
        )  # fmt: skip


@dataclass(frozen=True)
class Rendered:
    """originals[b], and views[v][b] with draws[v] and specs[v]: sample b, view v."""

    originals: list[Image.Image]
    views: list[list[Image.Image]]
    draws: list[ViewDraws]
    specs: list[ViewSpec]


def main(argv: list[str] | None = None) -> int:
    return config.run_command(_command, HELP, argv)


def _command(overrides: list[str]) -> int:
    print(f"views: {run(overrides)}")
    return 0


def run(overrides: Sequence[str]) -> Path:
    """Draw the picture and return its path. Raises ValueError for a wrong setting, an unknown id, or unusable data."""
    own = [o for o in overrides if o.partition("=")[0] in OWN]
    show = config.convert(ShowConfig, config.compose("show_views", own)["views"], "views")
    cfg = config.load([o for o in overrides if o not in own])
    manifest = cfg.data.manifest()
    rendered = render(manifest, cfg.view_specs(), show.ids, show.epoch, cfg.run.seed, cfg.loader.backend)
    caption = f"epoch {show.epoch}\nseed {cfg.run.seed}"
    picture = draw_grid(rendered, [_name(manifest, i) for i in show.ids], caption)
    out = Path(show.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    return out


def render(
    manifest: Manifest, specs: Sequence[ViewSpec], ids: Sequence[int], epoch: int, seed: int, backend: str = "auto"
) -> Rendered:
    """The views of the samples `ids` as training at `epoch` makes them on a CPU."""
    if max(ids) >= manifest.num_samples:
        last = manifest.num_samples - 1
        raise ValueError(f"views.ids holds {max(ids)}, but the samples of {manifest.place} are 0 to {last}")
    rows = np.array(ids, dtype=np.int64)
    index = manifest.index()[rows]
    numbered = flatten(specs)
    draws = [draw_view(spec, view, seed, epoch, rows, index["width"], index["height"]) for view, spec in numbered]
    files = _read(manifest, rows)
    bands = manifest.bands
    for i, file, size in zip(ids, files, index[["width", "height"]].tolist()):
        if not bands and (what := header_fault(file, size)):
            raise ValueError(f"{manifest.member_name(i)} cannot be decoded ({what}); choose other views.ids")
    renderer = backends.make(backend, specs, len(ids), device="cpu", threads=1, output="uint8", depth=1, bands=bands)
    try:
        renderer.submit(backends.Job(files, draws, [manifest.member_name(i) for i in ids]))
        tensors = renderer.collect()
    finally:
        renderer.close()
    shown = [spec for _, spec in numbered]
    if bands:
        return _rendered_stamps([decode(file) for file in files], tensors, draws, shown)
    originals = [Image.open(io.BytesIO(file), formats=FORMATS).convert("RGB") for file in files]
    views = [[_to_image(view) for view in tensor] for tensor in tensors]
    return Rendered(originals, views, draws, shown)


def _rendered_stamps(
    stamps: Sequence[np.ndarray], tensors: Sequence[Tensor], draws: list[ViewDraws], specs: list[ViewSpec]
) -> Rendered:
    """Originals and views of a sample on one scale; a view of where pixels are positive is white there."""
    scales = [scale_of(stamp) for stamp in stamps]
    views = []
    for tensor, spec in zip(tensors, specs):
        pixels = light(tensor, spec).numpy()
        if spec.shows == "positive":
            views.append([to_image(colours(stamp)) for stamp in pixels])
        else:
            views.append([picture(stamp, scale) for stamp, scale in zip(pixels, scales)])
    return Rendered([picture(stamp, scale) for stamp, scale in zip(stamps, scales)], views, draws, specs)


def draw_grid(rendered: Rendered, names: Sequence[str], caption: str = "") -> Image.Image:
    """One row a sample: its name, the original with every crop outlined in its view's colour, then the views.

    Below a view stand its strong operations in their order, one a line.
    """
    factor = max(1, math.ceil(CELL_PX / max(spec.size for spec in rendered.specs)))
    cell = max(factor * spec.size for spec in rendered.specs)
    widths = [cell, *(max(factor * spec.size, CELL_PX) for spec in rendered.specs)]
    lefts = [LABEL_PX + sum(widths[:i]) + GAP_PX * i for i in range(len(widths))]
    strong_lines = [
        [_strong_lines(rendered, view, b) for view in range(len(rendered.specs))] for b in range(len(names))
    ]
    sides = [factor * spec.size for spec in rendered.specs]
    heights = [max(cell, *(s + LINE_PX * len(below) for s, below in zip(sides, row))) for row in strong_lines]
    tops = [TITLE_PX + sum(heights[:b]) + GAP_PX * b for b in range(len(names))]
    picture = Image.new("RGB", (lefts[-1] + widths[-1] + GAP_PX, tops[-1] + heights[-1] + GAP_PX), "white")
    pen = ImageDraw.Draw(picture)
    font = ImageFont.load_default(12)

    pen.multiline_text((GAP_PX, 4), caption, "gray", font)
    pen.text((lefts[0], 4), "original", "black", font)
    pen.text((lefts[0], 18), "with the crops", "gray", font)
    for view, spec in enumerate(rendered.specs):
        pen.text((lefts[view + 1], 4), _title(rendered.specs, view), "black", font)
        pen.text((lefts[view + 1], 18), f"{spec.size} px", COLOURS[view % len(COLOURS)], font)
    for b, (name, top) in enumerate(zip(names, tops)):
        pen.multiline_text((GAP_PX, top), name, "black", font)
        picture.paste(_with_crops(rendered, b, cell), (lefts[0], top))
        for view, (images, side, left) in enumerate(zip(rendered.views, sides, lefts[1:])):
            picture.paste(images[b].resize((side, side), Image.Resampling.NEAREST), (left, top))
            for line, text in enumerate(strong_lines[b][view]):
                pen.text((left, top + side + line * LINE_PX), text, "black", font)
    return picture


def _strong_lines(rendered: Rendered, view: int, b: int) -> list[str]:
    """The strong operations that were applied, such as `rotate -12°`; directions are those of `pipelines.strong`."""
    draws, size = rendered.draws[view], rendered.specs[view].size
    drawn = zip(draws.strong_operation[b].tolist(), draws.strong_level[b].tolist(), draws.strong_sign[b].tolist())
    return [_strong_line(strong.POOL[place], level, sign, size) for place, level, sign in drawn if place >= 0]


def _strong_line(name: str, level: int, sign: int, size: int) -> str:
    amounts = {
        "posterize": f" {strong.posterize_bits(level)} bits",
        "rotate": f" {strong.rotate_deg(level, sign):+.0f}°",
        "shear_x": f" {strong.shear(level, sign):+.2f}",
        "shear_y": f" {strong.shear(level, sign):+.2f}",
        "solarize": f" {strong.solarize_threshold(level)}",
        "translate_x": f" {strong.translate_px(level, sign, size):+d} px",
        "translate_y": f" {strong.translate_px(level, sign, size):+d} px",
    }
    if name in ("brightness", "saturation", "contrast", "sharpness"):
        amounts[name] = f" {strong.enhance_factor(level):.2f}"
    return name.replace("_", " ") + amounts.get(name, "")


def _with_crops(rendered: Rendered, b: int, cell: int) -> Image.Image:
    """The original, fitted into `cell` px, with the outline of each random crop."""
    original = rendered.originals[b]
    scale = cell / max(original.size)
    fitted = original.resize([max(1, round(scale * side)) for side in original.size], Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(fitted)
    for view, (spec, draws) in enumerate(zip(rendered.specs, rendered.draws, strict=True)):
        if spec.crop == "random_resized":
            top, left, height, width = (scale * int(x) for x in draws.crop[b])
            right, bottom = min(left + width, fitted.width - 1), min(top + height, fitted.height - 1)
            pen.rectangle((left, top, right, bottom), outline=COLOURS[view % len(COLOURS)], width=2)
        elif spec.crop == "turned" and spec.shows == "pixels":
            corners = [(scale * x, scale * y) for x, y in _turned_corners(draws, b, original.size)]
            pen.polygon(corners, outline=COLOURS[view % len(COLOURS)], width=2)
    return fitted


def _turned_corners(draws: ViewDraws, b: int, size: tuple[int, int]) -> list[tuple[float, float]]:
    """Where the corners of a turned window lie in the image before it was turned counter-clockwise, as x, y in px."""
    top, left, height, width = (int(number) for number in draws.crop[b])
    centre_x, centre_y = size[0] / 2, size[1] / 2
    sine, cosine = math.sin(math.radians(draws.turn_deg[b])), math.cos(math.radians(draws.turn_deg[b]))
    corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
    around = [(x - centre_x, y - centre_y) for x, y in corners]
    return [(centre_x + cosine * x - sine * y, centre_y + sine * x + cosine * y) for x, y in around]


def _title(specs: Sequence[ViewSpec], view: int) -> str:
    """The view's role, numbered from 1 through all its sizes where the role has several views. `specs`: one a view."""
    roles = [spec.role for spec in specs]
    role = roles[view]
    return role if roles.count(role) == 1 else f"{role} {roles[: view + 1].count(role)}"


def _read(manifest: Manifest, rows: np.ndarray) -> list[bytes]:
    reader = Reader(manifest, threads=1)
    try:
        return whole(file for part in reader.request(rows) for file in part.result())
    finally:
        reader.close()


def _name(manifest: Manifest, sample: int) -> str:
    """The sample's id, and its class below where it has one."""
    label = int(manifest.index()[sample]["label"])
    name = (manifest.classes or ())[label] if label >= 0 else ""
    return f"{sample}\n{name if len(name) <= 13 else name[:12] + '…'}"


def _to_image(view: Tensor) -> Image.Image:
    """(3, S, S) uint8 -> picture."""
    return Image.fromarray(view.permute(1, 2, 0).contiguous().numpy())


if __name__ == "__main__":
    sys.exit(main())
