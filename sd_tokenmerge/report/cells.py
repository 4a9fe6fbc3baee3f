"""Numbers as text, and rows arranged as tables of methods by keep rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sd_tokenmerge.report.rows import (
    SweepRow,
    distance_name,
    keep_rates_of,
    merged_labels,
    require_comparable,
)

MISSING = "\N{EN DASH}"
"""Stands for a quantity that was not measured."""
MARK = "*"
"""Marks a distance that differs from the unmerged pipeline's by more than two standard errors."""

_SIGNS = {
    "±": "±: one standard error.",
    MARK: f"{MARK}: differs from unmerged by more than two standard errors of the difference, "
    "which is paired by seed.",
    "∞": "∞: identical images.",
}


@dataclass(frozen=True)
class TextTable:
    """A table of text.

    Attributes:
        title: the quantity that it shows.
        header: column titles.
        body: one list of cells per line, as long as `header`; None separates measured from
            published rows.
        bold: `(line in body, column)` of each cell to be printed bold.
    """

    title: str
    header: list[str]
    body: list[list[str] | None]
    bold: frozenset[tuple[int, int]] = frozenset()

    @property
    def legend(self) -> list[str]:
        """A sentence for each sign that occurs in the table."""
        cells = [text for line in self.body if line for text in line[1:]]
        legend = [text for sign, text in _SIGNS.items() if any(sign in cell for cell in cells)]
        if self.bold:
            legend.append("Bold: lowest of its column, significant or not.")
        return legend


def number(value: float | None, decimals: int = 2, *, signed: bool = False) -> str:
    """A number with a true minus sign, or `MISSING` for None."""
    if value is None:
        return MISSING
    text = f"{value:{'+' if signed else ''}.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}").replace("inf", "\N{INFINITY}")


def keep_rate_text(keep_rate: float) -> str:
    """A keep rate in per cent without trailing zeros: `70 %`, `12.5 %`."""
    return f"{100 * keep_rate:.6g} %"


def pivots(rows: Sequence[SweepRow], published: Sequence[SweepRow] = ()) -> list[TextTable]:
    """Tables of methods by keep rates: the distance, its change from unmerged, and the PSNR.

    The lowest distance of each column is bold, as in the papers. Published rows appear below the
    measured ones if extractor and protocol are the same, and in tables of their own otherwise.

    Args:
        rows: measured rows.
        published: rows to show with them.

    Returns:
        A table for each of these quantities that was measured.

    Raises:
        ValueError: the measured rows are not comparable, or there are none.
    """
    require_comparable(rows)
    scales = {(r.extractor, r.protocol) for r in [*rows, *published] if r.fid is not None}
    parts = [part for part in (rows, published) if part]
    groups = [parts] if len(scales) < 2 else [[part] for part in parts]
    tables = [table for group in groups for table in _distance_tables(group)]
    if any(row.psnr_db is not None for row in rows):
        title = "PSNR to the unmerged image of the same seed (dB, median)"
        tables.append(_pivot([_merged(rows)], title, _psnr))
    return tables


def listing(rows: Sequence[SweepRow]) -> TextTable:
    """Every measured quantity of every row; columns without a measurement are left out."""
    columns: dict[str, Callable[[SweepRow], str]] = {
        distance_name(rows): _distance,
        "Δ to unmerged": _delta,
        "KID x 10³": lambda row: _with_error(row.kid, row.kid_se, 1000),
        "PSNR (dB)": _psnr,
        "SSIM": lambda row: number(row.ssim, 3),
        "feature distance": lambda row: number(row.feature_distance),
        "s/image": lambda row: number(row.seconds_per_image),
    }
    shown = {
        title: texts
        for title, cell in columns.items()
        if set(texts := [cell(row) for row in rows]) != {MISSING}
    }
    body: list[list[str] | None] = [
        [row.label, keep_rate_text(row.keep_rate), *cells]
        for row, *cells in zip(rows, *shown.values(), strict=True)
    ]
    return TextTable("All measurements", ["method", "keep rate", *shown], body)


def _distance_tables(parts: Sequence[Sequence[SweepRow]]) -> list[TextTable]:
    """The distance, and its difference from unmerged."""
    rows = [row for part in parts for row in part]
    name = distance_name(rows)
    if all(row.source == "published" for row in rows):
        name += " as published"
    tables = []
    if any(row.fid is not None for row in rows):
        tables.append(_pivot(parts, name, _distance, bold_lowest=True))
    if any(row.delta is not None for row in rows):
        merged = [_merged(part) for part in parts]
        tables.append(_pivot(merged, f"{name}: difference to unmerged", _delta))
    return tables


def _pivot(
    parts: Sequence[Sequence[SweepRow]],
    title: str,
    cell: Callable[[SweepRow], str],
    *,
    bold_lowest: bool = False,
) -> TextTable:
    """One quantity by method and keep rate, the unmerged value repeated on each line."""
    keep_rates = keep_rates_of([row for part in parts for row in part])
    body: list[list[str] | None] = []
    bold: set[tuple[int, int]] = set()
    for part in filter(None, parts):
        if body:
            body.append(None)
        unmerged = next((row for row in part if row.is_baseline), None)
        found = {(row.label, row.keep_rate): row for row in part}
        labels = merged_labels(part)
        lowest = _lowest(part) if bold_lowest and len(labels) > 1 else []
        for label in labels or [row.label for row in part]:
            rows = [found.get((label, k), unmerged if k == 1 else None) for k in keep_rates]
            bold |= {(len(body), j) for j, row in enumerate(rows, start=1) if row in lowest}
            body.append([label, *(MISSING if row is None else cell(row) for row in rows)])
    return TextTable(title, ["method", *map(keep_rate_text, keep_rates)], body, frozenset(bold))


def _lowest(rows: Sequence[SweepRow]) -> list[SweepRow]:
    """The rows with the lowest distance of their keep rate."""
    lowest: dict[float, float] = {}
    merged = [row for row in _merged(rows) if row.fid is not None]
    for row in merged:
        lowest[row.keep_rate] = min(row.fid or 0.0, lowest.get(row.keep_rate, row.fid or 0.0))
    return [row for row in merged if row.fid == lowest[row.keep_rate]]


def _merged(rows: Sequence[SweepRow]) -> list[SweepRow]:
    return [row for row in rows if not row.is_baseline]


def _with_error(
    value: float | None, error: float | None, factor: float = 1, *, signed: bool = False
) -> str:
    """`value ± error`, both times `factor`."""
    if value is None:
        return MISSING
    text = number(value * factor, signed=signed)
    return text if error is None else f"{text} ± {number(error * factor)}"


def _distance(row: SweepRow) -> str:
    return _with_error(row.fid, row.fid_se) + (MARK if row.is_significant else "")


def _delta(row: SweepRow) -> str:
    text = _with_error(row.delta, row.delta_se, signed=True)
    return text + (MARK if row.is_significant else "")


def _psnr(row: SweepRow) -> str:
    return number(row.psnr_db, 1)
