"""Sheets of pictures beside numbers: rows of images of a split, each image with lines of text below it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from fastssl.stamp_pictures import picture, scale_of
from shard_tools.extract import read_image
from shard_tools.headers import FORMATS
from shard_tools.manifest import Manifest
from shard_tools.stamps import decode

CELL_PX, GAP_PX, LABEL_PX, TITLE_PX, LINE_PX, FONT_PX = 96, 8, 132, 26, 14, 12
WIDEST = 18  # characters of text that a label has room for


@dataclass(frozen=True)
class Cell:
    image: Image.Image
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """lines stand to the left of the cells."""

    lines: tuple[str, ...]
    cells: tuple[Cell, ...]


def thumbnails(manifest: Manifest, ids: Sequence[int], side_px: int = CELL_PX) -> list[Image.Image]:
    """The samples as they are stored, fitted into `side_px` px; of stamps three bands, each stamp on its own scale.

    What is smaller is enlarged by a whole factor, so that its pixels stay visible as they are.
    Raises ShardError for a sample that cannot be read.
    """
    index = manifest.index()
    return [_fitted(_opened(read_image(manifest, index, i), bool(manifest.bands)), side_px) for i in ids]


def draw_sheet(rows: Sequence[Row], title: str) -> Image.Image:
    """All rows below each other, under the title."""
    heights = [CELL_PX + LINE_PX * max(len(cell.lines) for cell in row.cells) for row in rows]
    columns = max(len(row.cells) for row in rows)
    font = ImageFont.load_default(FONT_PX)
    width = max(LABEL_PX + columns * (CELL_PX + GAP_PX), round(font.getlength(title)) + GAP_PX) + GAP_PX
    sheet = Image.new("RGB", (width, TITLE_PX + sum(heights) + GAP_PX * len(rows)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP_PX, 5), title, "black", font)
    top = TITLE_PX
    for row, height in zip(rows, heights):
        pen.multiline_text((GAP_PX, top), "\n".join(map(shortened, row.lines)), "black", font)
        for column, cell in enumerate(row.cells):
            left = LABEL_PX + column * (CELL_PX + GAP_PX)
            sheet.paste(cell.image, (left + (CELL_PX - cell.image.width) // 2, top))
            for line, text in enumerate(cell.lines):
                pen.text((left, top + CELL_PX + line * LINE_PX), text, "black", font)
        top += height + GAP_PX
    return sheet


def save(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def class_of(manifest: Manifest, sample: int) -> str:
    """The name of the sample's class, "" where it has none."""
    label = int(manifest.index()[sample]["label"])
    return (manifest.classes or ())[label] if label >= 0 else ""


def shortened(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _opened(payload: bytes, is_stamp: bool) -> Image.Image:
    if is_stamp:
        pixels = decode(payload)
        return picture(pixels, scale_of(pixels))
    return Image.open(io.BytesIO(payload), formats=FORMATS).convert("RGB")


def _fitted(image: Image.Image, side_px: int) -> Image.Image:
    longest = max(image.size)
    if longest <= side_px:
        factor = side_px // longest
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    size = [max(1, round(side * side_px / longest)) for side in image.size]
    return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
