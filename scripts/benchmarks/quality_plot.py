"""The Pareto plot of `quality`: change from the unmerged pictures against cost and time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.markdown import latest
from benchmarks.quality_settings import UNMERGED
from benchmarks.rows import read_rows

SERIES = {
    "kv-sized": ("ATC, kv with sizes", "#0072B2", "o-"),
    "kv-sized-refresh-5": ("clusters kept for 5 steps", "#0072B2", "o:"),
    "kv-sized-shared": ("and shared by a level's blocks", "#0072B2", "^-."),
    "kv": ("ATC, kv without sizes", "#56B4E9", "^--"),
    "q": ("ATC, q", "#E69F00", "v--"),
    "qkv": ("ATC, qkv (the paper)", "#D55E00", "s-"),
    "kv-sized-tome-sd": ("ToMe-SD, kv with sizes", "#009E73", "D-"),
    "kv-sized-random": ("random, kv with sizes", "0.55", "x:"),
    "qkv-tome-sd": ("ToMe-SD, qkv", "#CC79A7", "P--"),
    "tomesd": ("tomesd package", "#000000", "*-"),
    "preset-balanced": ("preset balanced", "#0072B2", "p"),
    "preset-fast": ("preset fast", "#0072B2", "h"),
}
"""Label, colour and marker, by the setting's name without its keep rate."""


def plot_quality(folder: Path) -> None:
    """Draw median PSNR against the attention's cost and against time of denoising.

    Args:
        folder: of `quality.csv` and `quality_time.csv`; gets `quality.png`.
    """
    rows = latest(read_rows(folder / "quality.csv"), ("setting",))
    rows = sorted((row for row in rows if row["psnr_db"]), key=lambda row: float(row["keep_rate"]))
    timed = latest(read_rows(folder / "quality_time.csv"), ("setting",))
    costs = {row["setting"]: 100 * float(row["attention_cost"]) for row in rows}
    times = {row["setting"]: float(row["relative"]) for row in timed}
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    by_cost, by_time = figure.subplots(1, 2, sharey=True)
    shown: dict[str, Any] = {}
    for axes, places in ((by_cost, costs), (by_time, times)):
        for name, (label, colour, marker) in SERIES.items():
            points = [row for row in rows if series_of(row["setting"]) == name]
            points = [row for row in points if row["setting"] in places]
            if not points:
                continue
            middle, low, high = (
                np.array([float(row[column]) for row in points])
                for column in ("psnr_db", "psnr_db_20", "psnr_db_80")
            )
            shown[label] = axes.errorbar(
                [places[row["setting"]] for row in points],
                middle,
                yerr=[middle - low, high - middle],
                fmt=marker,
                color=colour,
                elinewidth=1,
                capsize=2,
            )
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if UNMERGED in times:
        shown[UNMERGED] = by_time.axvline(1.0, color="0.4", linestyle=(0, (5, 3)))
    by_cost.set_xscale("log")
    by_cost.set_xticks([0.25, 1, 5, 10, 25, 50, 100], ["0.25", "1", "5", "10", "25", "50", "100"])
    by_cost.set_xlabel("products of queries and keys (% of unmerged)")
    by_cost.set_ylabel("PSNR to the unmerged picture (dB)")
    by_time.set_xlabel("time of denoising, relative to unmerged")
    figure.legend(
        shown.values(), shown.keys(), loc="outside right upper", frameon=False, fontsize=8.5
    )
    title = "Change by merging: median over the pictures; bars: 20 to 80 %"
    figure.suptitle(title, x=0.01, ha="left", size=11)
    figure.savefig(folder / "quality.png", dpi=160)


def series_of(setting: str) -> str:
    """The setting's name without its keep rate."""
    return re.sub(r"-\d+$", "", setting)
