"""Plots of a sweep: distance, and change per image, against the keep rate."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sd_tokenmerge.report.captions import fold
from sd_tokenmerge.report.cells import keep_rate_text
from sd_tokenmerge.report.rows import (
    SweepRow,
    baseline_of,
    distance_name,
    keep_rates_of,
    methods_of,
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

    The bars are standard errors of the difference to the unmerged pipeline, which is paired by
    seed: a point more than two bars away from the baseline differs. Where no such error is known
    they are those of the distance itself. The band about the baseline is the standard error of its
    own distance, which moves all points together.

    Args:
        rows: measured rows; comparable with one another.
        published: rows drawn in grey at their difference to their own baseline; those of another
            extractor are left out, because their unit is another one.
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
    baseline = baseline_of(measured)
    names = methods_of(measured)
    for i, name in enumerate(names):
        points = [row for row in measured if row.name == name]
        errors = [(row.delta_se if paired else row.fid_se) or 0.0 for row in points]
        values = [row.fid or 0.0 for row in points]
        _draw(axes, i, len(names), points, values, errors, errors, start=baseline)
    if baseline is not None:
        _draw_baseline(axes, baseline)
        published = [row for row in published if row.extractor == baseline.extractor]
        _draw_published(axes, baseline, published)
    _label(
        axes,
        keep_rates_of([*measured, *published] if baseline else measured),
        distance_name(measured[0].extractor),
    )
    axes.set_title("Distance to the reference set", loc="left", fontsize=11)
    bars = "difference to unmerged,\npaired by seed" if paired else "distance"
    with_bars = paired or any(row.fid_se is not None for row in measured)
    _legend(figure, f"bars: ± 1 SE of the\n{bars}" if with_bars else None)
    return figure


def plot_change(rows: Sequence[SweepRow], *, caption: str = "") -> Figure:
    """PSNR and, where known, SSIM to the unmerged image of the same seed against the keep rate.

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
    names = methods_of(changed)
    for panel, (quantity, title) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), panel + 1)
        for i, name in enumerate(names):
            points = [r for r in changed if r.name == name and getattr(r, quantity) is not None]
            values = [getattr(row, quantity) for row in points]
            below = [_gap(row, quantity, "low") for row in points]
            above = [_gap(row, quantity, "high") for row in points]
            _draw(axes, i, len(names), points, values, below, above)
        _label(axes, keep_rates_of(changed), title)
        axes.spines["right"].set_visible(False)
    _legend(figure, "median; bars:\n20 to 80 % of images")
    figure.suptitle("Change to the unmerged image of the same seed", x=0.01, ha="left", fontsize=11)
    return figure


def png_bytes(figure: Figure) -> bytes:
    """What `plot_distance` or `plot_change` returned as a PNG file; equal figures, equal bytes."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160)
    return out.getvalue()


def _figure(width: float, height: float, caption: str) -> Figure:
    # Figure without pyplot: no global state, no window system, the Agg canvas by default.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if caption:
        text = "\n".join(fold(caption, lambda line: len(line) > width * 17))
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7.5, color="0.35")
    return figure


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
    """One method's line; methods are moved apart a little so that their bars don't overlap."""
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
        label=points[0].name if points else None,
    )
    if start is not None and start.fid is not None and points:
        first = max(range(len(places)), key=places.__getitem__)
        axes.plot([100, places[first]], [start.fid, values[first]], color=colour, linewidth=0.9)


def _draw_baseline(axes: Axes, baseline: SweepRow) -> None:
    level = baseline.fid or 0.0
    axes.axhline(level, color="0.25", linewidth=1.2, linestyle=(0, (5, 3)), label="unmerged")
    if baseline.fid_se is not None:
        low, high = level - baseline.fid_se, level + baseline.fid_se
        axes.axhspan(low, high, color="0.5", alpha=0.14, linewidth=0, label="± 1 SE of unmerged")

    def to_delta(fid: Any) -> Any:
        return fid - level

    def to_fid(delta: Any) -> Any:
        return delta + level

    axes.secondary_yaxis("right", functions=(to_delta, to_fid)).set_ylabel("Δ to unmerged")


def _draw_published(axes: Axes, baseline: SweepRow, published: Sequence[SweepRow]) -> None:
    for i, name in enumerate(methods_of(published)):
        points = [row for row in published if row.name == name and row.delta is not None]
        axes.plot(
            [100.0, *(100 * row.keep_rate for row in points)],
            [
                (baseline.fid or 0.0) + delta
                for delta in (0.0, *(row.delta or 0.0 for row in points))
            ],
            color="0.55",
            linewidth=1,
            linestyle=_DASHES[i % len(_DASHES)],
            label=f"Δ of {name}",
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


def _gap(row: SweepRow, quantity: str, side: str) -> float:
    """Length of one bar; zero where its end is unknown or infinite."""
    bound = getattr(row, f"{quantity}_{side}")
    if bound is None or math.isinf(bound):
        return 0.0
    return float(abs(bound - getattr(row, quantity)))
