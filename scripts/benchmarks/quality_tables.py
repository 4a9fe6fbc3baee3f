"""Tables of what merging does to pictures, and the README's table of the presets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite, sqrt
from pathlib import Path
from statistics import mean, stdev

from benchmarks.markdown import (
    NOT_RUN,
    Row,
    conditions,
    grouped,
    latest,
    number,
    plus_minus,
    table,
)
from benchmarks.quality_plot import SIZES, timed_rows
from benchmarks.quality_recipes import UNMERGED
from benchmarks.rows import read_rows
from benchmarks.unet import SELF_ATTENTION
from sd_tokenmerge import PRESETS
from sd_tokenmerge.bench.plot import frontier

PAIRS = (
    ("preset-near-lossless", "kv-zeroth-26.6"),
    ("preset-near-lossless", "two-sided-input-12.5-refresh-3"),
    ("preset-near-lossless", "two-sided-tome-sd-4-12.5"),
    ("preset-near-lossless", "steps-20"),
    ("preset-balanced", "two-sided-tome-sd-4-6.25"),
    ("preset-balanced", "tomesd-50"),
    ("preset-balanced", "steps-18"),
    ("preset-balanced", "reuse-2"),
    ("preset-balanced", "deepcache-2"),
    ("preset-balanced", "two-sided-lloyd-keys-6.25-refresh-2"),
    ("preset-fast", "two-sided-input-5-refresh-3"),
    ("preset-fast", "steps-15"),
    ("preset-fast", "dpm-15"),
    ("two-sided-lloyd-25-refresh-2", "two-sided-tome-sd-input-25"),
    ("two-sided-input-12.5-refresh-2", "two-sided-input-12.5-refresh-3"),
    ("two-sided-12.5", "two-sided-12.5-refresh-3"),
    ("two-sided-complete-12.5", "preset-near-lossless"),
    ("steps-20", "steps-20-balanced"),
    ("steps-15", "reuse-2"),
    ("steps-15", "deepcache-2"),
)
"""Recipes to compare on pictures of equal seeds: first minus second."""


SD15 = ("sd15-512", "sd15-768", "sd15-1024")
INSTEAD = ("tomesd-50", "deepcache-2", "steps-20", "steps-15")
"""What the README compares the presets with."""


def quality(folder: Path) -> str:
    """All recipes, in a table for each size."""
    rows = latest(read_rows(folder / "quality.csv"), ("size", "recipe"))
    times = latest(read_rows(folder / "quality_time.csv"), ("size", "recipe"))
    return (
        "\n\n".join(
            quality_table(group, [row for row in times if row["size"] == group[0]["size"]])
            for group in grouped(rows, ("size",))
        )
        or NOT_RUN
    )


def quality_table(rows: Sequence[Row], times: Sequence[Row] = ()) -> str:
    """One line per recipe of pictures of one size."""
    if not rows:
        return NOT_RUN
    first = rows[0]
    notes = f"**{first['size']} px**: {first['images']} pictures, {first['references']} references;"
    notes += f" {conditions(rows)}"
    if times:
        notes += (
            f" Time per picture relative to unmerged in the same run, there {times[0]['s']} s "
            f"(batch {times[0]['batch']}): {conditions(times)}"
        )
    full = next((float(row["products"]) for row in rows if row["recipe"] == UNMERGED), None)
    relative = {row["recipe"]: row["relative"] for row in times}
    lines = [_line(row, full, relative.get(row["recipe"], "")) for row in rows]
    head = ["recipe", "products", "time", "PSNR, dB: median (20 to 80 %)", "worst", "mean ± SE"]
    head += ["SSIM", "feature distance", "named correctly", "set distance minus unmerged's"]
    return f"{notes}\n\n{table(head, lines)}"


def _line(row: Row, full: float | None, time: str) -> list[str]:
    products = f"{100 * float(row['products']) / full:.3g} %" if full else "-"
    distance = plus_minus(row, "fid", "fid_se", 1) + " (itself)"
    if row.get("delta"):
        distance = plus_minus(row, "delta", "delta_se", 1)
    change = ["-"] * 5
    if row.get("psnr_db"):
        low, high = (number(row[f"psnr_db_{percent}"], 1) for percent in (20, 80))
        change = [
            f"{number(row['psnr_db'], 1)} ({low} to {high})",
            number(row["psnr_db_worst"], 1),
            plus_minus(row, "psnr_mean", "psnr_se", 1),
            plus_minus(row, "ssim_mean", "ssim_se", 3),
            plus_minus(row, "feature_distance", "feature_distance_se", 2),
        ]
    named = f"{100 * float(row['named']):.0f} %"
    return [row["recipe"], products, number(time, 2), *change, named, distance]


def time_table(rows: Sequence[Row]) -> str:
    """Times alone."""
    lines = [[row["recipe"], row["s"], row["relative"], row["repeats"]] for row in rows]
    head = ["recipe", "s per picture", "relative to unmerged", "turns"]
    return f"{conditions(rows)}\n\n{table(head, lines)}"


def frontier_table(folder: Path) -> str:
    """The plot, and the recipes that no other beats in both time and PSNR, fastest first."""
    lines = []
    for size in SIZES:
        found = timed_rows(folder, size)
        for point in frontier([point for _, point in found.values()]):
            row = found[point.name][0]
            lines.append(
                [
                    f"{size} px",
                    point.name,
                    f"{point.time:.2f}",
                    f"{point.psnr:.1f}",
                    plus_minus(row, "psnr_mean", "psnr_se", 1),
                    f"{100 * float(row['named']):.0f} %",
                    plus_minus(row, "delta", "delta_se", 1),
                ]
            )
    head = ["", "recipe", "time", "PSNR, dB: median", "mean ± SE", "named correctly"]
    if not lines:
        return NOT_RUN
    plot = "![PSNR against time per picture](benchmarks/quality.png)"
    return "\n\n".join([plot, table([*head, "set distance minus unmerged's"], lines)])


def psnr_differences(folder: Path, size: str, first: str, second: str) -> list[float]:
    """PSNR of one recipe's pictures minus another's, for pictures that differ from unmerged."""
    values: dict[str, dict[str, float]] = {first: {}, second: {}}
    for row in read_rows(folder / "quality_images.csv"):
        if row["size"] == size and row["recipe"] in values and row["psnr_db"]:
            values[row["recipe"]][row["file"]] = float(row["psnr_db"])
    both = sorted(values[first].keys() & values[second].keys())
    differences = [values[first][file] - values[second][file] for file in both]
    return [value for value in differences if isfinite(value)]


def paired(folder: Path) -> str:
    """Differences of PSNR between recipes, picture by picture."""
    lines = list(_paired_lines(folder))
    head = ["", "pair", "PSNR, dB: mean difference ± SE", "higher in"]
    return table(head, lines) if lines else NOT_RUN


def _paired_lines(folder: Path) -> Iterator[list[str]]:
    for size in SIZES:
        for first, second in PAIRS:
            found = psnr_differences(folder, size, first, second)
            if len(found) > 1:
                error = stdev(found) / sqrt(len(found))
                higher = f"{sum(value > 0 for value in found)} of {len(found)}"
                change = f"{mean(found):+.1f} ± {error:.1f}"
                yield [f"{size} px", f"{first} minus {second}", change, higher]


def presets(folder: Path) -> str:
    """The README's table: what the presets, and fewer steps instead, save and change."""
    attention = {
        (row["case"], row["contestant"]): f"{100 / float(row['speedup']):.0f} %"
        for row in read_rows(folder / "unet.csv")
        if row["benchmark"] == SELF_ATTENTION
    }
    rows = latest(read_rows(folder / "quality.csv"), ("size", "recipe"))
    times = latest(read_rows(folder / "quality_time.csv"), ("size", "recipe"))
    found = {(row["size"], row["recipe"]): row for row in rows}
    relative = {(row["size"], row["recipe"]): number(row["relative"], 2) for row in times}
    if not attention or not found:
        return NOT_RUN
    full, lines = float(found["256", UNMERGED]["products"]), []
    for name in (*(f"preset-{preset}" for preset in PRESETS), *INSTEAD):
        if ("256", name) not in found:
            continue
        products = f"{100 * float(found['256', name]['products']) / full:.3g} %"
        saved = [attention.get((case, name), "-") for case in SD15]
        cells = [products, *(["-"] * 3 if name.startswith("steps-") else saved)]
        for size in SIZES:
            row = found.get((size, name))
            cells += [plus_minus(row, "psnr_mean", "psnr_se", 1) if row else "-"]
            cells += [relative.get((size, name), "-")]
        lines.append([f"`{name}`", *cells])
    head = ["", "products", *(f"attention, {case.removeprefix('sd15-')} px" for case in SD15)]
    return table([*head, *(f"{of}, {size} px" for size in SIZES for of in ("dB", "time"))], lines)
