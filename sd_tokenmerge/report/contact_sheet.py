"""Grids of pictures with labels: methods by keep rates, and unmerged beside merged."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sd_tokenmerge.report.captions import fold

_BACKGROUND = "white"
_INK = "#1a1a1a"
_FAINT = "#6b6b6b"
_EMPTY = "#eceae4"
_LONGEST_LABEL = 500  # characters; no label that fits on a sheet is longer


@dataclass(frozen=True)
class PictureGrid:
    """Pictures of one prompt and seed under several settings.

    Attributes:
        heading: printed above the grid, for example the prompt.
        rows: one label per row, for example the methods.
        columns: one label per column, for example the keep rates.
        cells: pictures or their file names by row and column; None leaves a cell empty.
    """

    heading: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Path | Image.Image | None]]


def contact_sheet(
    grids: Sequence[PictureGrid], *, cell: int = 176, grids_per_row: int = 2, caption: str = ""
) -> Image.Image:
    """Draw picture grids beside and below each other.

    Args:
        grids: at least one.
        cell: height and width of a picture on the sheet in pixels; pictures are scaled to fit,
            with their aspect ratio.
        grids_per_row: at least 1.
        caption: printed small at the bottom.

    Returns:
        The sheet, RGB.

    Raises:
        OSError: a picture cannot be read; the message names it.
    """
    drawn = [_draw_grid(grid, cell) for grid in grids]
    lines = [drawn[i : i + grids_per_row] for i in range(0, len(drawn), grids_per_row)]
    gap = min(cell // 6, 30)
    width = max(sum(g.width for g in line) + gap * (len(line) - 1) for line in lines) + 2 * gap
    height = sum(max(g.height for g in line) for line in lines) + gap * (len(lines) + 1)
    font = label_font(max(11, _text_size(cell) - 4))
    texts = fold(caption, lambda text: font.getlength(text) > width - 2 * gap)
    line_height = round(font.size * 1.4)
    sheet = Image.new("RGB", (width, height + line_height * len(texts)), _BACKGROUND)
    y = gap
    for line in lines:
        x = gap
        for grid in line:
            sheet.paste(grid, (x, y))
            x += grid.width + gap
        y += max(grid.height for grid in line) + gap
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(texts):
        draw.text((gap, y - gap // 2 + i * line_height), text, fill=_FAINT, font=font)
    return sheet


def side_by_side(
    pairs: Sequence[tuple[Path, Path]],
    labels: tuple[str, str],
    *,
    headings: Sequence[str],
    caption: str = "",
    cell: int = 224,
) -> Image.Image:
    """The same seeds unmerged and merged, two pairs in a row.

    Args:
        pairs: file names of the unmerged and the merged picture, at least one pair.
        labels: printed above the two pictures of each pair.
        headings: one for each pair, for example the prompt.
        caption: printed small at the bottom.
        cell: height and width of each picture in pixels.

    Returns:
        The picture, RGB.

    Raises:
        ValueError: there is not one heading per pair.
        OSError: a picture cannot be read; the message names it.
    """
    grids = [
        PictureGrid(heading, [""], labels, [pair])
        for heading, pair in zip(headings, pairs, strict=True)
    ]
    return contact_sheet(grids, cell=cell, caption=caption)


def _draw_grid(grid: PictureGrid, cell: int) -> Image.Image:
    text_size = _text_size(cell)
    font, bold = label_font(text_size), label_font(text_size, bold=True)
    gap = max(2, cell // 44)
    line = round(text_size * 1.45)
    labels = [_wrapped(label) for label in grid.rows]
    longest = max(font.getlength(part) for label in labels for part in label)
    left = round(longest) + 3 * gap if longest else 0
    top = line + (line if grid.heading else 0)
    width = left + len(grid.columns) * (cell + gap) - gap
    height = top + len(grid.rows) * (cell + gap) - gap
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((left, 0), _shortened(grid.heading, bold, width - left), fill=_INK, font=bold)
    for j, label in enumerate(grid.columns):
        x = left + j * (cell + gap) + cell / 2
        text = _shortened(label, font, cell)
        draw.text((x, top - 0.35 * line), text, fill=_INK, font=font, anchor="ms")
    for i, (parts, sources) in enumerate(zip(labels, grid.cells, strict=True)):
        y = top + i * (cell + gap)
        middle, text = (left - 2 * gap, y + cell / 2), "\n".join(parts)
        draw.multiline_text(middle, text, fill=_INK, font=font, anchor="rm", align="right")
        for j, (_, source) in enumerate(zip(grid.columns, sources, strict=True)):
            sheet.paste(_picture(source, cell), (left + j * (cell + gap), y))
    return sheet


def _picture(source: Path | Image.Image | None, cell: int) -> Image.Image:
    square = Image.new("RGB", (cell, cell), _EMPTY if source is None else _BACKGROUND)
    if source is None:
        return square
    picture = _read(source) if isinstance(source, Path) else source
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    square.paste(picture, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square


def _read(file: Path) -> Image.Image:
    try:
        with Image.open(file) as opened:
            return opened.convert("RGB")
    except OSError as error:
        raise OSError(f"`{file}` is not a readable picture ({error}).") from error


def _text_size(cell: int) -> int:
    return min(max(12, cell // 11), 20)


def _wrapped(label: str) -> list[str]:
    """A method string, broken after the colon and the commas."""
    return re.split(r"(?<=[:,])", " ".join(label.split()))


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Text on one line, cut so that it fits."""
    whole = " ".join(text.split())
    text = whole[:_LONGEST_LABEL]
    if text == whole and font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


@cache
def label_font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font of all labels in pictures, `size` pixels high."""
    # matplotlib ships DejaVu Sans, so that labels look the same on every machine.
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
