"""Numbers as text, and the arrangement of rows into methods by keep rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sd_tokenmerge.report.rows import (
    SweepRow,
    distance_name,
    keep_rates_of,
    methods_of,
    require_comparable,
)

MISSING = "\N{EN DASH}"
"""What stands where nothing was measured."""
MARK = "*"
"""What follows a distance whose difference to the unmerged pipeline exceeds two standard errors."""


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are text.

    Attributes:
        title: what the values are.
        header: column titles.
        body: one row of text per setting or method, as long as `header`; None is a rule between
            ours and published rows.
        notes: what the signs in it mean, of those that occur.
        bold: row and column in `body` of the cells to print bold.
    """

    title: str
    header: list[str]
    body: list[list[str] | None]
    notes: list[str]
    bold: frozenset[tuple[int, int]] = frozenset()


def number(value: float | None, decimals: int = 2, *, signed: bool = False) -> str:
    """A number with a true minus sign, or `MISSING` for None."""
    if value is None:
        return MISSING
    text = f"{value:{'+' if signed else ''}.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}").replace("inf", "\N{INFINITY}")


def with_error(value: float | None, error: float | None, *, signed: bool = False) -> str:
    """`value ± error`, or what of it is known."""
    text = number(value, signed=signed)
    return text if value is None or error is None else f"{text} ± {number(error)}"


def keep_rate_text(keep_rate: float) -> str:
    """A keep rate in percent, without needless decimals: `70 %`, `12.5 %`."""
    return f"{100 * keep_rate:.6g} %"


def distance_cell(row: SweepRow) -> str:
    """Distance, standard error and mark of one setting."""
    return with_error(row.fid, row.fid_se) + (MARK if row.is_significant else "")


def delta_cell(row: SweepRow) -> str:
    """Difference to the unmerged pipeline, its standard error and mark."""
    text = with_error(row.delta, row.delta_se, signed=True)
    return text + (MARK if row.is_significant else "")


def psnr_cell(row: SweepRow) -> str:
    """PSNR to the unmerged image."""
    return number(row.psnr_db, 1)


def pivots(rows: Sequence[SweepRow], published: Sequence[SweepRow] = ()) -> list[TextTable]:
    """Methods by keep rates: the distance, its difference to unmerged, the change per image.

    The lowest distance of each column is bold, as in the papers. Published rows stand below ours
    where they have the same extractor and protocol, and in a table of their own where they don't.

    Args:
        rows: measured rows.
        published: rows to show with them, possibly none.

    Returns:
        A table for each of the quantities that was measured.

    Raises:
        ValueError: the measured rows are not comparable, or there are none.
    """
    require_comparable(rows)
    parts = [[*rows], [*published]] if published else [[*rows]]
    groups = [parts] if _same_scale(parts) else [[part] for part in parts]
    tables = [table for group in groups for table in _distances(group)]
    if any(row.psnr_db is not None for row in rows):
        title = "PSNR to the unmerged image of the same seed (dB, median)"
        tables.append(_pivot([[row for row in rows if not row.is_baseline]], title, psnr_cell))
    return tables


def listing(rows: Sequence[SweepRow]) -> TextTable:
    """Every measured quantity of every row; columns in which nothing was measured are left out."""
    columns: list[tuple[str, Callable[[SweepRow], str]]] = [
        (_distance_of(rows), distance_cell),
        ("Δ to unmerged", delta_cell),
        ("KID x 10³", lambda r: with_error(_times(r.kid, 1000), _times(r.kid_se, 1000))),
        ("PSNR (dB)", psnr_cell),
        ("SSIM", lambda r: number(r.ssim, 3)),
        ("feature distance", lambda r: number(r.feature_distance)),
        ("s/image", lambda r: number(r.seconds_per_image, 2)),
    ]
    texts = {title: [cell(row) for row in rows] for title, cell in columns}
    shown = [title for title in texts if any(text != MISSING for text in texts[title])]
    body: list[list[str] | None] = [
        [row.name, keep_rate_text(row.keep_rate), *(texts[title][i] for title in shown)]
        for i, row in enumerate(rows)
    ]
    return TextTable("All measurements", ["method", "keep rate", *shown], body, _signs(body))


def _distances(parts: Sequence[Sequence[SweepRow]]) -> list[TextTable]:
    """The distance and, where known, its difference to unmerged."""
    rows = [row for part in parts for row in part]
    name = _distance_of(rows)
    if all(row.source == "published" for row in rows):
        name = f"{name} as published"
    tables = []
    if any(row.fid is not None for row in rows):
        tables.append(_pivot(parts, name, distance_cell, bold_lowest=True))
    if any(row.delta is not None for row in rows):
        merged = [[row for row in part if not row.is_baseline] for part in parts]
        tables.append(_pivot(merged, f"{name}: difference to unmerged", delta_cell))
    return tables


def _pivot(
    parts: Sequence[Sequence[SweepRow]],
    title: str,
    cell: Callable[[SweepRow], str],
    *,
    bold_lowest: bool = False,
) -> TextTable:
    """Arrange one value by method and keep rate, the unmerged value repeated in each row."""
    keep_rates = keep_rates_of([row for part in parts for row in part])
    body: list[list[str] | None] = []
    bold: set[tuple[int, int]] = set()
    for part in filter(None, parts):
        if body:
            body.append(None)
        unmerged = next((row for row in part if row.is_baseline), None)
        names = methods_of(part)
        found = {(row.name, row.keep_rate): row for row in part if not row.is_baseline}
        best = _lowest(part) if bold_lowest and len(names) > 1 else {}
        for name in names or ([unmerged.name] if unmerged else []):
            texts = [name]
            for keep_rate in keep_rates:
                row = found.get((name, keep_rate), unmerged if keep_rate == 1 else None)
                if row is not None and keep_rate in best and row.fid == best[keep_rate]:
                    bold.add((len(body), len(texts)))
                texts.append(MISSING if row is None else cell(row))
            body.append(texts)
    notes = _signs(body)
    if bold:
        notes.append("Bold: lowest of its column, whether or not the difference is significant.")
    header = ["method", *map(keep_rate_text, keep_rates)]
    return TextTable(title, header, body, notes, frozenset(bold))


def _signs(body: list[list[str] | None]) -> list[str]:
    cells = [text for row in body if row for text in row[1:]]
    signs = {
        "±": "±: one standard error.",
        MARK: f"{MARK}: differs from unmerged by more than two standard errors of the difference, "
        "which is paired by seed.",
        "∞": "∞: identical images.",
    }
    return [meaning for sign, meaning in signs.items() if any(sign in text for text in cells)]


def _same_scale(parts: list[list[SweepRow]]) -> bool:
    scales = {
        (row.extractor, row.protocol) for part in parts for row in part if row.fid is not None
    }
    return len(scales) < 2


def _distance_of(rows: Sequence[SweepRow]) -> str:
    return distance_name(next((row.extractor for row in rows if row.extractor), None))


def _lowest(rows: Sequence[SweepRow]) -> dict[float, float]:
    lowest: dict[float, float] = {}
    for row in rows:
        if row.fid is not None and not row.is_baseline:
            lowest[row.keep_rate] = min(row.fid, lowest.get(row.keep_rate, row.fid))
    return lowest


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
