"""The plot of `quality`: how far pictures are from the unmerged ones, against time."""

from __future__ import annotations

from pathlib import Path

from benchmarks.markdown import Row, latest
from benchmarks.rows import read_rows
from sd_tokenmerge.bench.plot import Point, plot_against_time

SIZES = ("256", "512")


def timed_rows(folder: Path, size: str) -> dict[str, tuple[Row, Point]]:
    """The last row of each recipe that has a PSNR and a time, with its place in the plot."""
    times = {
        row["recipe"]: float(row["relative"])
        for row in read_rows(folder / "quality_time.csv")
        if row["size"] == size
    }
    found = {}
    for row in latest(read_rows(folder / "quality.csv"), ("size", "recipe")):
        name = row["recipe"]
        if row["size"] == size and name in times and row["psnr_db"]:
            psnr = (float(row[column]) for column in ("psnr_db", "psnr_db_20", "psnr_db_80"))
            found[name] = row, Point(name, times[name], *psnr)
    return found


def plot_quality(folder: Path) -> None:
    """Draw median PSNR against time, one panel for each size.

    Args:
        folder: of `quality.csv` and `quality_time.csv`; gets `quality.png`, unless no recipe has
            both a PSNR and a time.
    """
    panels = {
        f"{size} px: {(int(size) // 8) ** 2:,} tokens": [point for _, point in found.values()]
        for size in SIZES
        if (found := timed_rows(folder, size))
    }
    if panels:
        plot_against_time(
            panels,
            folder / "quality.png",
            full="25 steps unmerged",
            bars="20 to 80 % of the pictures, around the median",
        )
