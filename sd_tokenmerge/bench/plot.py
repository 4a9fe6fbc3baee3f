"""Plots of closeness to the full picture against time, with the frontier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {
    "steps": ("fewer steps", "#000000", "s"),
    "dpm": ("DPM-Solver++, fewer steps", "#7F7F7F", "D"),
    "reuse": ("attention reused over steps", "#E69F00", "v"),
    "deepcache": ("DeepCache", "#D55E00", "^"),
    "tomesd": ("tomesd package", "#CC79A7", "P"),
    "preset": ("presets", "#009E73", "*"),
    "two-sided": ("two-sided merging", "#0072B2", "o"),
    "kv": ("merged keys and values", "#56B4E9", "o"),
    "q": ("other forms of merging", "#B0A0D8", "X"),
    "both": ("merging and fewer steps", "#8B4513", "p"),
}
"""Label, colour and marker of each kind of recipe."""

TICKS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.5, 2, 3, 4, 6)
MOST_NAMES = 12
"""With more points in a panel, only presets and those on the frontier are named."""
NAME_HEIGHT = 8.5
"""Distance between names above each other, in points."""


@dataclass(frozen=True)
class Point:
    """A recipe in the plot.

    Attributes:
        name: of the recipe.
        time: per picture, relative to the full recipe.
        psnr: to the picture of the full recipe in dB.
        low: lower end of its bar.
        high: upper end of its bar.
    """

    name: str
    time: float
    psnr: float
    low: float
    high: float

    @property
    def kind(self) -> str:
        """The key of `KINDS` that the recipe belongs to."""
        if self.name.startswith("steps-") and not self.name.removeprefix("steps-").isdigit():
            return "both"
        if self.name.startswith("q"):
            return "q"
        return next(kind for kind in KINDS if self.name.startswith(kind))


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in both time and PSNR, fastest first.

    The full recipe beats all that are no faster.
    """
    best: list[Point] = []
    faster = (point for point in points if point.time < 1)
    for point in sorted(faster, key=lambda point: (point.time, -point.psnr)):
        if not best or point.psnr > best[-1].psnr:
            best.append(point)
    return best


def plot_against_time(
    panels: Mapping[str, Sequence[Point]], path: Path, *, full: str, bars: str
) -> None:
    """Draw PSNR against time, in one panel for each title.

    Args:
        panels: at least one point for each title.
        path: the PNG file.
        full: what time and PSNR are relative to.
        bars: what the bars show.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(panels) + 2.2, 5.2), layout="constrained")
    shown: dict[str, Any] = {}
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)
    for axes, (title, points) in zip(grid[0], panels.items(), strict=True):
        _draw(axes, points, shown)
        axes.set_title(title, size=11)
        axes.set_xlabel(f"time per picture, relative to {full}")
    for axes, points in zip(grid[0], panels.values(), strict=True):
        _write_names(axes, points)
    figure.axes[0].set_ylabel(f"PSNR to the picture of {full} (dB)")
    order = [label for label, _, _ in KINDS.values() if label in shown]
    figure.legend(
        [shown[""], *(shown[label] for label in order)],
        ["no other is faster and closer", *order],
        loc="outside right upper",
        frameon=False,
        fontsize=9,
    )
    title = f"Up: closer to the full picture. Left: faster.\nBars: {bars}"
    figure.suptitle(title, x=0.01, ha="left", size=11)
    figure.savefig(path, dpi=160)


def _draw(axes: Any, points: Sequence[Point], shown: dict[str, Any]) -> None:
    for kind, (label, colour, marker) in KINDS.items():
        own = [point for point in points if point.kind == kind]
        if not own:
            continue
        times, middle = [point.time for point in own], [point.psnr for point in own]
        lengths = [[p.psnr - p.low for p in own], [p.high - p.psnr for p in own]]
        axes.errorbar(times, middle, lengths, fmt="none", ecolor=colour, alpha=0.25)
        shown[label] = axes.scatter(times, middle, c=colour, marker=marker, s=45, zorder=3)
    best = frontier(points)
    corners = [point.time for point in best], [point.psnr for point in best]
    (shown[""],) = axes.plot(*corners, color="0.3", linewidth=1.2, linestyle=(0, (5, 2)))
    axes.axvline(1.0, color="0.6", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    times = [1.0, *(point.time for point in points)]
    axes.set_xlim(0.6 * min(times), 1.35 * max(times))  # room for names
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _write_names(axes: Any, points: Sequence[Point]) -> None:
    """Write presets' names to the right of their points, others to the left.

    Names of one side never overlap: from top to bottom, each keeps its distance from the last.
    """
    best = frontier(points)
    named = [
        point
        for point in points
        if len(points) <= MOST_NAMES or point.kind == "preset" or point in best
    ]
    axes.figure.draw_without_rendering()  # settles where the points are
    points_per_pixel = 72 / axes.figure.dpi
    lowest = {"left": float("inf"), "right": float("inf")}
    for point in sorted(named, key=lambda point: -point.psnr):
        side, x, above = ("left", 5, -2) if point.kind == "preset" else ("right", -4, 5)
        place = point.time, point.psnr
        y = axes.transData.transform(place)[1] * points_per_pixel
        lowest[side] = min(y + above, lowest[side] - NAME_HEIGHT)
        offset = x, lowest[side] - y
        axes.annotate(point.name, place, xytext=offset, textcoords="offset points", size=7, ha=side)
