"""Grids of pictures with readable labels: methods by keep rates, and unmerged beside merged."""

from __future__ import annotations

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


@dataclass(frozen=True)
class PictureGrid:
    """Pictures of one prompt and seed under several settings.

    Attributes:
        heading: printed above the grid, for example the prompt.
        rows: one label per row, for example the methods.
        columns: one label per column, for example the keep rates.
        cells: file names by row and column; None leaves a cell empty.
    """

    heading: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Sequence[Sequence[Path | None]]

    def __post_init__(self) -> None:
        """Refuse labels that don't match the cells.

        Raises:
            ValueError: `cells` is empty, or not one row per row label and one file per column
                label.
        """
        shape = f"{len(self.rows)} rows of {len(self.columns)}"
        if not self.rows or not self.columns:
            raise ValueError(f"`cells` must hold at least one picture, got {shape}.")
        if len(self.cells) != len(self.rows) or any(
            len(row) != len(self.columns) for row in self.cells
        ):
            got = ", ".join(str(len(row)) for row in self.cells)
            raise ValueError(f"`cells` must be {shape} as labelled, got rows of {got or 'none'}.")


def contact_sheet(
    grids: Sequence[PictureGrid], *, cell: int = 176, grids_per_row: int = 2, caption: str = ""
) -> Image.Image:
    """Draw picture grids beside and below each other.

    Args:
        grids: at least one.
        cell: height and width of a picture on the sheet in pixels, at least 32; pictures are fitted
            into it with their aspect ratio.
        grids_per_row: at least 1.
        caption: printed small at the bottom.

    Returns:
        The sheet, RGB.

    Raises:
        ValueError: no grids, or `cell` or `grids_per_row` is too small.
        OSError: a picture cannot be read; the message names it.
    """
    if not grids:
        raise ValueError("`grids` must hold at least one grid, got none.")
    if cell < 32:
        raise ValueError(f"`cell` must be at least 32 pixels, got {cell}.")
    if grids_per_row < 1:
        raise ValueError(f"`grids_per_row` must be at least 1, got {grids_per_row}.")
    drawn = [_draw_grid(grid, cell) for grid in grids]
    lines = [drawn[i : i + grids_per_row] for i in range(0, len(drawn), grids_per_row)]
    gap = min(cell // 6, 30)
    width = max(sum(g.width for g in line) + gap * (len(line) - 1) for line in lines) + 2 * gap
    height = sum(max(g.height for g in line) for line in lines) + gap * (len(lines) + 1)
    return _compose(lines, width, height, gap, _font(max(11, _text_size(cell) - 4)), caption)


def side_by_side(
    pairs: Sequence[tuple[Path, Path]],
    labels: tuple[str, str],
    *,
    headings: Sequence[str] = (),
    caption: str = "",
    cell: int = 224,
) -> Image.Image:
    """The same seeds unmerged and merged, for a page's first picture.

    Args:
        pairs: file names of the unmerged and the merged picture, at least one pair.
        labels: what is printed above the two of each pair.
        headings: one for each pair, for example the prompt; default: none.
        caption: printed small at the bottom.
        cell: height and width of each picture in pixels.

    Returns:
        The picture, RGB; two pairs in a row.

    Raises:
        ValueError: no pairs, another number of headings, or `cell` is too small.
        OSError: a picture cannot be read.
    """
    if headings and len(headings) != len(pairs):
        raise ValueError(f"`headings` must be one per pair, {len(pairs)}, got {len(headings)}.")
    grids = [
        PictureGrid(headings[i] if headings else "", [""], list(labels), [pair])
        for i, pair in enumerate(pairs)
    ]
    return contact_sheet(grids, cell=cell, grids_per_row=2, caption=caption)


def _draw_grid(grid: PictureGrid, cell: int) -> Image.Image:
    text_size = _text_size(cell)
    font, bold = _font(text_size), _font(text_size, bold=True)
    gap = max(2, cell // 44)
    line = round(text_size * 1.45)
    labelled = any(grid.rows)
    left = max(round(_width(font, part)) for row in grid.rows for part in _wrapped(row)) + 3 * gap
    left = left if labelled else 0
    top = line + (line if grid.heading else 0)
    width = left + len(grid.columns) * (cell + gap) - gap
    height = top + len(grid.rows) * (cell + gap) - gap
    sheet = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if grid.heading:
        draw.text((left, 0), _shorten(grid.heading, bold, width - left), fill=_INK, font=bold)
    for j, label in enumerate(grid.columns):
        x = left + j * (cell + gap) + cell / 2
        text = _shorten(label, font, cell)
        draw.text((x, top - 0.35 * line), text, fill=_INK, font=font, anchor="ms")
    for i, label in enumerate(grid.rows):
        y = top + i * (cell + gap)
        text = "\n".join(_wrapped(label))
        draw.multiline_text(
            (left - 2 * gap, y + cell / 2), text, fill=_INK, font=font, anchor="rm", align="right"
        )
        for j, file in enumerate(grid.cells[i]):
            sheet.paste(_picture(file, cell), (left + j * (cell + gap), y))
    return sheet


def _compose(
    lines: Sequence[Sequence[Image.Image]],
    width: int,
    height: int,
    gap: int,
    font: ImageFont.FreeTypeFont,
    caption: str,
) -> Image.Image:
    texts = fold(caption, lambda line: _width(font, line) > width - 2 * gap)
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


def _picture(file: Path | None, cell: int) -> Image.Image:
    square = Image.new("RGB", (cell, cell), _EMPTY if file is None else _BACKGROUND)
    if file is None:
        return square
    try:
        with Image.open(file) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise OSError(f"`{file}` is not a readable picture ({error}).") from error
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    square.paste(picture, ((cell - size[0]) // 2, (cell - size[1]) // 2))
    return square


def _text_size(cell: int) -> int:
    return min(max(12, cell // 11), 20)


def _wrapped(label: str) -> list[str]:
    """A method string on lines of its own after the colon and the commas."""
    return label.replace(":", ":\n").replace(",", ",\n").split("\n")


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    if _width(font, text) <= width:
        return text
    while text and _width(font, text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _width(font: ImageFont.FreeTypeFont, text: str) -> float:
    return font.getlength(text)


@cache
def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    # matplotlib ships DejaVu Sans, so that labels look the same on every machine.
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)
