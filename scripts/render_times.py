"""Tables of times and memory in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from bench_rows import read_rows
from bench_tables import (
    NOT_RUN,
    Row,
    conditions,
    conditions_of,
    grouped,
    latest,
    number,
    table,
)
from pipeline_contestants import oracle_name

from sd_tokenmerge import PRESETS

MODEL = ("device", "dtype", "batch", "threads")
"""What rows that compare with each other have in common, besides the case."""


def pipeline(folder: Path) -> str:
    """Step times by case, device and run."""
    head = "| | step, ms (20 to 80 %) | turns | speed-up | of the oracle's saving "
    parts = []
    for first, group, speedups in runs(folder / "pipeline.csv"):
        lines = [first, "", head + "| of its own clusters' |", "|---|---|---|---|---|---|"]
        for row in group:
            share = oracle_share(row["contestant"], speedups)
            lines.append(
                f"| {row['contestant']} | {spread(row)} | {row['repeats']} | {row['speedup']} "
                f"| {share} | {own_share(row)} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOT_RUN


def attention(folder: Path) -> str:
    """Times of the merged self-attentions by case, device and run."""
    head = "| | in a call, ms (20 to 80 %) | turns | of unmerged | longer than the oracle, ms "
    parts = []
    for first, group, speedups in runs(folder / "attention.csv"):
        unmerged = next(float(row["step_ms"]) for row in group if row["contestant"] == "unpatched")
        lines = [
            first,
            "",
            head + "| of the oracle's saving | of its own clusters' |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in group:
            name = row["contestant"]
            oracle = oracle_of(name)
            longer = "-"
            if not is_bound(name) and oracle in speedups:
                longer = f"{unmerged * (1 / speedups[name] - 1 / speedups[oracle]):.0f}"
            lines.append(
                f"| {name} | {spread(row)} | {row['repeats']} | {1 / speedups[name]:.2f} "
                f"| {longer} | {oracle_share(name, speedups)} | {own_share(row)} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOT_RUN


def runs(path: Path) -> Iterator[tuple[str, list[Row], dict[str, float]]]:
    """Of each run that is shown, the conditions, the rows, and speed-ups by contestant."""
    for (case, *_), group in grouped(last_runs(path), ("case", *MODEL, "commit")):
        first = group[0]
        title = f"**{case}**, {first['dtype']}, batch {first['batch']}; {conditions(first)}"
        yield title, group, {row["contestant"]: float(row["speedup"]) for row in group}


def spread(row: Row) -> str:
    """A step's median and percentiles."""
    return f"{row['step_ms']} ({row['step_ms_20']} to {row['step_ms_80']})"


def last_runs(path: Path) -> list[Row]:
    """Each contestant's last row, with the unpatched UNet and the oracles of the same run."""
    run = ("case", *MODEL, "commit")
    rows = latest(read_rows(path), ("contestant", *run))
    settings = [row for row in rows if not is_bound(row["contestant"])]
    last = latest(settings, ("contestant", "case", *MODEL))
    shown_runs = {tuple(row[name] for name in run) for row in last}
    shown = [
        row
        for row in rows
        if row in last or (is_bound(row["contestant"]) and tuple(row[n] for n in run) in shown_runs)
    ]
    cases = list(dict.fromkeys(row["case"] for row in shown))
    return sorted(shown, key=lambda row: cases.index(row["case"]))


def is_bound(contestant: str) -> bool:
    """Whether it is not a setting, but what settings are compared with."""
    return contestant == "unpatched" or contestant.startswith("oracle")


def oracle_of(contestant: str) -> str:
    """The oracle that merges as much: a preset's own, else qkv at 50 %."""
    if not contestant.startswith("preset-"):
        return "oracle-qkv-50"
    preset = PRESETS[contestant.removeprefix("preset-")]
    return oracle_name(preset.merge, preset.keep_rate)


def oracle_share(contestant: str, speedups: dict[str, float]) -> str:
    """How much of what its oracle saves this contestant saves."""
    oracle = oracle_of(contestant)
    if is_bound(contestant) or oracle not in speedups:
        return "-"
    most = 1 - 1 / speedups[oracle]
    return f"{100 * (1 - 1 / speedups[contestant]) / most:.0f} %" if most > 0 else "-"


def own_share(row: Row) -> str:
    """How much a contestant saves of what it would save if its own clusters cost nothing."""
    if not row["kept_ms"]:
        return "-"
    step = float(row["step_ms"])
    unpatched = step * float(row["speedup"])
    most = unpatched - float(row["kept_ms"])
    return f"{100 * (unpatched - step) / most:.0f} %" if most > 0 else "-"


def compiled(folder: Path) -> str:
    """Step times eager and compiled, by case and device."""
    rows = latest(read_rows(folder / "compile.csv"), ("case", "contestant", *MODEL))
    parts = []
    for (case, *_), group in grouped(rows, ("case", *MODEL)):
        first = group[0]
        lines = [
            f"**{case}**, {first['dtype']}, batch {first['batch']}; {conditions(first)}",
            "",
            "| | eager, ms (20 to 80 %) | speed-up | compiled, ms (20 to 80 %) | speed-up "
            "| over compiled unpatched | compiling, s | graphs | compiled again in a generation |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        bound = {row["contestant"]: float(row["compiled_speedup"]) for row in group}
        for row in group:
            cells = [row["contestant"]]
            for mode in ("eager", "compiled"):
                spread = f"({row[f'{mode}_ms_20']} to {row[f'{mode}_ms_80']})"
                cells += [f"{row[f'{mode}_ms']} {spread}", f"{float(row[f'{mode}_speedup']):.2f}"]
            is_known = "unpatched" in bound and row["contestant"] != "unpatched"
            over = bound[row["contestant"]] / bound["unpatched"] if is_known else None
            cells += [
                "-" if over is None else f"{over:.2f}",
                number(row["compile_s"], 0),
                row["graphs"],
                f"{row['recompilations']} in {row['steps']} steps",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOT_RUN


def memory(folder: Path) -> str:
    """Peak memory by case and device."""
    rows = latest(read_rows(folder / "memory.csv"), ("case", "contestant", *MODEL))
    parts = []
    for (case, *_), group in grouped(rows, ("case", *MODEL)):
        first = group[0]
        unpatched = {row["contestant"]: row for row in group}.get("unpatched")
        lines = []
        for row in group:
            relative = (
                f"{float(row['attention_mib']) / float(unpatched['attention_mib']):.2f}"
                if unpatched
                else "-"
            )
            peak = f"{number(row['peak_mib'], 0)}, in `{row['peak_in']}`"
            lines.append(
                [row["contestant"], number(row["attention_mib"], 0), relative, peak],
            )
        head = ["", "around a merged self-attention, MiB", "relative", "whole call, MiB"]
        parts.append(
            f"**{case}**, {first['dtype']}, batch {first['batch']}; {conditions_of(group)}\n\n"
            + table(head, lines)
        )
    return "\n\n".join(parts) or NOT_RUN


def images(folder: Path) -> str:
    """Times of pictures by case and device."""
    key = ("case", "device", "dtype", "threads", "steps")
    rows = latest(read_rows(folder / "image.csv"), ("contestant", *key))
    parts = []
    for (case, *_), group in grouped(rows, key):
        first = group[0]
        lines = [
            [
                row["contestant"],
                f"{row['image_s']} ({row['image_s_20']} to {row['image_s_80']})",
                row["repeats"],
                number(row["unet_s"], 1),
                row["unpatched_call_ms"],
                row["speedup"] or "-",
            ]
            for row in group
        ]
        head = ["", "picture, s (20 to 80 %)", "turns", "of that in the UNet, s"]
        head += ["unpatched call at that time, ms", "speed-up"]
        parts.append(
            f"**{case}**, {first['dtype']}, {first['steps']} steps, {first['unet_calls']} calls of "
            f"the UNet with two images; {conditions(first)}\n\n" + table(head, lines)
        )
    return "\n\n".join(parts) or NOT_RUN
