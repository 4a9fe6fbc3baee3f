"""Tables of the effect of merging on pictures, and the README's table of the presets."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt
from pathlib import Path
from statistics import mean, stdev

from benchmarks.markdown import NOT_RUN, Row, conditions, latest, number, plus_minus, table
from benchmarks.rows import read_rows
from benchmarks.unet import STEP

PAIRS = (
    ("kv-sized-shared-50", "tomesd-50"),
    ("kv-sized-shared-25", "tomesd-50"),
    ("kv-sized-tome-sd-25", "tomesd-50"),
    ("preset-balanced", "tomesd-50"),
    ("preset-fast", "tomesd-50"),
    ("preset-fast", "tomesd-25"),
    ("tomesd-25", "tomesd-50"),
    ("qkv-50", "tomesd-50"),
    ("kv-sized-25", "qkv-50"),
    ("kv-sized-10", "qkv-25"),
    ("kv-25", "qkv-50"),
    ("kv-sized-25", "kv-25"),
    ("kv-sized-10", "kv-10"),
    ("kv-sized-25", "q-25"),
    ("kv-sized-10", "q-10"),
    ("kv-sized-50", "kv-sized-tome-sd-50"),
    ("kv-sized-25", "kv-sized-tome-sd-25"),
    ("kv-sized-25", "kv-sized-complete-25"),
    ("kv-sized-10", "kv-sized-complete-10"),
    ("kv-sized-10", "kv-sized-random-10"),
    ("kv-sized-10", "kv-sized-keys-10"),
    ("kv-sized-10", "kv-sized-refresh-5-10"),
    ("kv-sized-keys-10", "kv-sized-shared-10"),
)
"""Pairs of settings to compare on pictures of equal seeds: first minus second."""

PEER = "tomesd-50"
"""The setting that README's table compares with."""
RECOMMENDED = (
    ('`preset="balanced"`', "25 %", "preset-balanced", "preset-balanced"),
    ('`preset="fast"`', "10 %", "preset-fast", "preset-fast"),
    ("the `tomesd` package", "50 %", PEER, PEER),
    ("the `tomesd` package", "25 %", "tomesd-25", "tomesd-25"),
    ('`preset="paper"`: ATC as in its paper', "50 %", "preset-paper", "qkv-50"),
    ("the same by scikit-learn, as in the paper's code", "50 %", "scikit-learn-atc-50", None),
)
"""README's rows: name, tokens kept, contestant of `unet`, setting of `quality`."""


def quality(folder: Path) -> str:
    """Change and distance by setting, beside the time of denoising."""
    rows = latest(read_rows(folder / "quality.csv"), ("setting",))
    return quality_table(rows, latest(read_rows(folder / "quality_time.csv"), ("setting",)))


def quality_table(rows: Sequence[Row], times: Sequence[Row]) -> str:
    """One line per setting."""
    if not rows:
        return NOT_RUN
    notes = [f"{rows[0]['images']} pictures, {rows[0]['references']} references; "]
    notes[0] += conditions(rows[:1])
    if times:
        first = times[0]
        notes.append(
            f"Time of denoising relative to unmerged in the same run, there {first['ms']} ms per "
            f"picture and step (batch {first['batch']}, {first['steps']} steps, median of "
            f"{first['repeats']}): {conditions(times[:1])}"
        )
    relative = {row["setting"]: row["relative"] for row in times}
    lines = []
    for row in rows:
        change = ["-"] * 4
        if row.get("psnr_db"):
            low, high = (number(row[f"psnr_db_{percent}"], 1) for percent in (20, 80))
            change = [
                f"{number(row['psnr_db'], 1)} ({low} to {high})",
                plus_minus(row, "psnr_mean", "psnr_se", 1),
                plus_minus(row, "ssim_mean", "ssim_se", 3),
                plus_minus(row, "feature_distance", "feature_distance_se", 2),
            ]
        distance = plus_minus(row, "fid", "fid_se", 2) + " (itself)"
        if row.get("delta"):
            distance = plus_minus(row, "delta", "delta_se", 2)
        cost = f"{100 * float(row['attention_cost']):.3g} %"
        duration = number(relative.get(row["setting"], ""), 2)
        lines.append([row["setting"], cost, *change, distance, duration])
    head = ["setting", "cost of attention", "PSNR, dB: median (20 to 80 %)", "mean ± SE", "SSIM"]
    head += ["feature distance", "set distance minus unmerged's", "time"]
    return "\n".join([*notes, "", table(head, lines)])


def time_table(rows: Sequence[Row]) -> str:
    """Times of denoising alone."""
    lines = [[row["setting"], row["ms"], row["relative"], row["repeats"]] for row in rows]
    head = ["setting", "ms per picture and step", "relative to unmerged", "turns"]
    return f"{conditions(rows[:1])}\n\n{table(head, lines)}"


def psnr_differences(folder: Path, first: str, second: str) -> list[float]:
    """PSNR of one setting's pictures minus another's, for pictures that differ from unmerged."""
    values: dict[str, dict[str, float]] = {first: {}, second: {}}
    for row in read_rows(folder / "quality_images.csv"):
        if row["setting"] in values:
            values[row["setting"]][row["file"]] = float(row["psnr_db"])
    both = sorted(values[first].keys() & values[second].keys())
    differences = [values[first][file] - values[second][file] for file in both]
    return [value for value in differences if isfinite(value)]


def paired(folder: Path) -> str:
    """Differences of PSNR between settings, picture by picture."""
    lines = []
    for first, second in PAIRS:
        found = psnr_differences(folder, first, second)
        if len(found) > 1:
            error = stdev(found) / sqrt(len(found))
            higher = f"{sum(value > 0 for value in found)} of {len(found)}"
            change = f"{mean(found):+.2f} ± {error:.2f}"
            lines.append([f"{first} minus {second}", change, higher])
    if not lines:
        return NOT_RUN
    return table(["pair", "PSNR, dB: mean difference ± SE", "higher in"], lines)


def presets(folder: Path) -> str:
    """The README's table: savings and changes by the presets and tomesd."""
    steps = [row for row in read_rows(folder / "unet.csv") if row["benchmark"] == STEP]
    speedups = {(row["case"], row["contestant"]): row["speedup"] for row in steps}
    changes = {row["setting"]: row for row in read_rows(folder / "quality.csv")}
    if not speedups or not changes:
        return NOT_RUN
    lines = []
    for what, kept, contestant, setting in RECOMMENDED:
        cells = [what, kept]
        for case in ("sd15-512", "sd15-768"):
            speedup = speedups.get((case, contestant))
            cells.append(f"{float(speedup):.2f}x" if speedup else "-")
        if setting is None:
            lines.append([*cells, "(same clusters)", ""])
            continue
        closer, found = "0", psnr_differences(folder, setting, PEER)
        if setting != PEER:
            error = stdev(found) / sqrt(len(found)) if len(found) > 1 else 0.0
            closer = f"{mean(found):+.1f} ± {error:.1f} dB" if found else "-"
        row = changes.get(setting)
        change = f"{float(row['delta']):+.1f} ± {number(row['delta_se'], 1)}" if row else "-"
        lines.append([*cells, closer, change])
    head = ["", "tokens kept", "512 px", "768 px"]
    head += ["PSNR, minus that of `tomesd` at 50 %", "set distance, minus unmerged's"]
    return table(head, lines)
