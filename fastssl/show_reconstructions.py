"""A picture of what a decoder makes of its codes: `fastssl-reconstructions checkpoint=RUN data.root=SHARDS`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastssl import checkpoint, config
from fastssl.settings import Config
from fastssl.show_views import ShowConfig
from fastssl.stamp_pictures import colours, light, picture, scale_of, to_image
from pipelines.loader import read_once
from pipelines.views import normalize
from shard_tools.manifest import Manifest

HELP = """
fastssl-reconstructions: a picture of stamps or images beside what a trained decoder makes of their codes

  fastssl-reconstructions checkpoint=runs/galaxies data.root=SHARDS data.split=test views.out=drawn.png

  checkpoint=RUN|RUN/checkpoints/step-N    of method moco_decoder or autoencoder
  views.ids=[0,1,2]  views.epoch=0         the query views of these samples in that epoch; data.split=test
exit codes: 0 done, 2 a setting, the checkpoint or the data is wrong
"""

CELL_PX, GAP_PX, TITLE_PX = 144, 8, 22
COLUMNS = ("query view", "drawn from its code", "difference")


@dataclass(frozen=True)
class ShowData:
    root: str
    split: str


@dataclass(frozen=True)
class ShowReconstructions:
    checkpoint: str
    data: ShowData
    views: ShowConfig


def main(argv: list[str] | None = None) -> int:
    return config.run_command(_command, HELP, argv)


def _command(overrides: list[str]) -> int:
    print(f"reconstructions: {run(overrides)}")
    return 0


def run(overrides: Sequence[str]) -> Path:
    """Draw the picture and return its path. Raises ValueError for a wrong setting, checkpoint or unusable data."""
    show = config.convert(ShowReconstructions, config.compose("show_reconstructions", overrides))
    method, cfg = checkpoint.load_method(show.checkpoint)
    if not hasattr(method, "reconstruct"):
        raise ValueError(
            f"checkpoint {show.checkpoint} is of method {cfg.method['name']}, which has no decoder to show"
        )
    images, drawn = reconstruct(method, cfg, Manifest.load(show.data.root, show.data.split), show.views)
    out = Path(show.views.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(images, drawn).save(out)
    return out


@torch.no_grad()
def reconstruct(method: torch.nn.Module, cfg: Config, manifest: Manifest, show: ShowConfig) -> tuple[Tensor, Tensor]:
    """The query views of the samples and what the method draws, float (B, C, S, S) in the data's own units."""
    if max(show.ids) >= manifest.num_samples:
        raise ValueError(
            f"views.ids holds {max(show.ids)}, but {manifest.place} has samples 0 to {manifest.num_samples - 1}"
        )
    query = next(spec for spec in cfg.view_specs() if spec.role == "query")
    (batch,) = read_once(
        manifest, [query], batch_size=len(show.ids), rows=list(show.ids), seed=cfg.run.seed, epoch=show.epoch
    )
    (images,) = batch.views["query"]
    if images.dtype == torch.uint8:
        images = normalize(images, query.augment.mean, query.augment.std, torch.float32)
    drawn = method.eval().reconstruct(images)  # type: ignore[operator]
    return light(images, query), light(drawn, query)


def draw(images: Tensor, drawn: Tensor) -> Image.Image:
    """One row a sample: the view, the drawing, and their difference around grey, on one scale for the row."""
    rows = []
    for image, drawing in zip(images.numpy(), drawn.numpy()):
        scale = scale_of(image)
        apart = to_image((colours(drawing) - colours(image)) / (2 * scale) + 0.5)
        cells = [picture(image, scale), picture(drawing, scale), apart]
        rows.append([cell.resize((CELL_PX, CELL_PX), Image.Resampling.NEAREST) for cell in cells])
    size = (GAP_PX + len(COLUMNS) * (CELL_PX + GAP_PX), TITLE_PX + len(rows) * (CELL_PX + GAP_PX))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, title in enumerate(COLUMNS):
        left = GAP_PX + column * (CELL_PX + GAP_PX)
        pen.text((left, 4), title, "black", font)
        for row, cells in enumerate(rows):
            sheet.paste(cells[column], (left, TITLE_PX + row * (CELL_PX + GAP_PX)))
    return sheet


if __name__ == "__main__":
    sys.exit(main())
