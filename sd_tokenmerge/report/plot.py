"""Plots of a sweep: distance, and change per image, against the keep rate."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from sd_tokenmerge.report.captions import fold
from sd_tokenmerge.report.cells import keep_rate_text
from sd_tokenmerge.report.rows import (
    SweepRow,
    distance_name,
    keep_rates_of,
    merged_labels,
    require_comparable,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, told apart under the common forms of colour blindness; markers and dashes
# differ too, so that the plots survive a grey print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_DASHES = ("-", "--", "-.", ":")


def plot_distance(
    rows: Sequence[SweepRow], *, published: Sequence[SweepRow] = (), caption: str = ""
) -> Figure:
    """The distance to the reference set against the keep rate, one line per method.

    Bars are standard errors of the difference to the unmerged pipeline, paired by seed: a point
    more than two bars away from the baseline differs from it. Without paired errors, they are
    standard errors of the distance itself. The band about the baseline is the standard error of
    its own distance, which moves all points together.

    Args:
        rows: measured rows that are comparable with one another.
        published: rows drawn in grey at their difference to their own baseline; rows of another
            extractor, whose unit differs, are left out.
        caption: conditions, printed small below the plot.

    Returns:
        The figure; `png_bytes` encodes it.

    Raises:
        ValueError: the rows are not comparable, or none has a distance.
    """
    require_comparable(rows)
    measured = [row for row in rows if row.fid is not None]
    if not measured:
        raise ValueError("`rows` must hold at least one distance, got none.")
    figure = _figure(8.2, 4.6, caption)
    axes = figure.add_subplot()
    paired = any(row.delta_se is not None for row in measured)
    baseline = next((row for row in measured if row.is_baseline), None)
    labels = merged_labels(measured)
    for i, label in enumerate(labels):
        points = [row for row in measured if row.label == label]
        errors = [(row.delta_se if paired else row.fid_se) or 0.0 for row in points]
        values = [row.fid or 0.0 for row in points]
        _draw(axes, i, len(labels), points, values, errors, errors, start=baseline)
    shown = measured
    if baseline is not None:
        _draw_baseline(axes, baseline)
        quoted = [row for row in published if row.extractor == baseline.extractor]
        _draw_published(axes, baseline, quoted)
        shown = [*measured, *quoted]
    _label(axes, keep_rates_of(shown), distance_name(measured))
    axes.set_title("Distance to the reference set", loc="left", fontsize=11)
    bars = "difference to unmerged,\npaired by seed" if paired else "distance"
    with_bars = paired or any(row.fid_se is not None for row in measured)
    _legend(figure, f"bars: ± 1 SE of the\n{bars}" if with_bars else None)
    return figure


def plot_change(rows: Sequence[SweepRow], *, caption: str = "") -> Figure:
    """PSNR and, if known, SSIM to the unmerged image of the same seed against the keep rate.

    Points are medians over the images; bars reach from the 20th to the 80th percentile.

    Args:
        rows: measured rows.
        caption: conditions, printed small below the plot.

    Returns:
        The figure; `png_bytes` encodes it.

    Raises:
        ValueError: a setting occurs twice, or no row has a finite PSNR.
    """
    require_comparable(rows)
    changed = [row for row in rows if row.psnr_db is not None and math.isfinite(row.psnr_db)]
    if not changed:
        raise ValueError("`rows` must hold at least one finite PSNR, got none.")
    with_ssim = any(row.ssim is not None for row in changed)
    panels = [("psnr_db", "PSNR (dB)"), ("ssim", "SSIM")][: 2 if with_ssim else 1]
    figure = _figure(3.9 * len(panels) + 2.2, 4.2, caption)
    labels = merged_labels(changed)
    for panel, (quantity, title) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), panel)
        for i, label in enumerate(labels):
            points = [r for r in changed if r.label == label and getattr(r, quantity) is not None]
            values = [getattr(row, quantity) for row in points]
            below = [_bar_length(row, quantity, "low") for row in points]
            above = [_bar_length(row, quantity, "high") for row in points]
            _draw(axes, i, len(labels), points, values, below, above)
        _label(axes, keep_rates_of(changed), title)
        axes.spines["right"].set_visible(False)
    _legend(figure, "median; bars:\n20 to 80 % of images")
    figure.suptitle("Change to the unmerged image of the same seed", x=0.01, ha="left", fontsize=11)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """A figure as a PNG file; equal figures give equal bytes.

    Characters that the font lacks, such as Chinese ones in a model's name, are drawn as boxes.
    """
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        figure.savefig(out, format="png", dpi=160)
    return out.getvalue()


def _figure(width: float, height: float, caption: str) -> Figure:
    # Figure without pyplot: no global state, no window system, the Agg canvas by default.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if caption:
        text = "\n".join(fold(caption, lambda line: len(line) > width * 17))
        figure.supxlabel(_literal(text), x=0.01, ha="left", fontsize=7.5, color="0.35")
    return figure


def _literal(text: str) -> str:
    """Text that matplotlib does not read as a formula."""
    return text.replace("$", r"\$")


def _draw(
    axes: Axes,
    index: int,
    count: int,
    points: Sequence[SweepRow],
    values: Sequence[float],
    below: Sequence[float],
    above: Sequence[float],
    start: SweepRow | None = None,
) -> None:
    """One method's line; methods are shifted a little so that their bars do not overlap."""
    if not points:
        return
    shift = 0.7 * (index - (count - 1) / 2)
    colour = _COLOURS[index % len(_COLOURS)]
    places = [100 * row.keep_rate - shift for row in points]
    axes.errorbar(
        places,
        values,
        yerr=[below, above],
        color=colour,
        marker=_MARKERS[index % len(_MARKERS)],
        linestyle=_DASHES[index // len(_COLOURS) % len(_DASHES)],
        markersize=5.5,
        linewidth=1.6,
        elinewidth=1.2,
        capsize=2.5,
        label=_literal(points[0].label),
    )
    if start is not None and start.fid is not None:
        first = max(range(len(places)), key=places.__getitem__)
        axes.plot([100, places[first]], [start.fid, values[first]], color=colour, linewidth=0.9)


def _draw_baseline(axes: Axes, baseline: SweepRow) -> None:
    level = baseline.fid or 0.0
    axes.axhline(level, color="0.25", linewidth=1.2, linestyle=(0, (5, 3)), label="unmerged")
    if baseline.fid_se is not None:
        low, high = level - baseline.fid_se, level + baseline.fid_se
        axes.axhspan(low, high, color="0.5", alpha=0.14, linewidth=0, label="± 1 SE of unmerged")
    to_delta, to_fid = partial(np.add, -level), partial(np.add, level)
    axes.secondary_yaxis("right", functions=(to_delta, to_fid)).set_ylabel("Δ to unmerged")


def _draw_published(axes: Axes, baseline: SweepRow, published: Sequence[SweepRow]) -> None:
    for i, label in enumerate(merged_labels(published)):
        points = [(100.0, 0.0)] + [
            (100 * row.keep_rate, row.delta)
            for row in published
            if row.label == label and row.delta is not None
        ]
        axes.plot(
            [keep_rate for keep_rate, _ in points],
            [(baseline.fid or 0.0) + delta for _, delta in points],
            color="0.55",
            linewidth=1,
            linestyle=_DASHES[i % len(_DASHES)],
            label=_literal(f"Δ of {label}"),
        )


def _label(axes: Axes, keep_rates: Sequence[float], quantity: str) -> None:
    axes.set_xticks([100 * rate for rate in keep_rates], [keep_rate_text(r) for r in keep_rates])
    axes.invert_xaxis()
    axes.set_xlabel("tokens kept")
    axes.set_ylabel(quantity)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines["top"].set_visible(False)


def _legend(figure: Figure, title: str | None) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    methods_first = sorted(range(len(labels)), key=lambda i: not hasattr(handles[i], "has_yerr"))
    figure.legend(
        [handles[i] for i in methods_first],
        [labels[i] for i in methods_first],
        loc="outside right upper",
        frameon=False,
        fontsize=8.5,
        title=title,
        title_fontsize=8.5,
        alignment="left",
    )


def _bar_length(row: SweepRow, quantity: str, side: str) -> float:
    """From the median to the percentile; zero if that is unknown or infinite."""
    bound = getattr(row, f"{quantity}_{side}")
    if bound is None or math.isinf(bound):
        return 0.0
    return float(abs(bound - getattr(row, quantity)))
