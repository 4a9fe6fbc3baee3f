"""Fill the marked blocks of docs/benchmarks.md from the committed rows, so that no number is typed.

    python scripts/render_benchmarks.py            # rewrite the document
    python scripts/render_benchmarks.py --check    # fail where it differs from its rows

A block is what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Of rows with the same
conditions, the last one counts.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from math import isfinite, sqrt
from pathlib import Path

from bench_rows import read_rows, write_or_check
from pipeline_contestants import oracle_name
from plot_quality import latest_times

from sd_tokenmerge import PRESETS

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, str]
NOT_RUN = "Not run."

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
"""Settings whose pictures are compared in pairs of equal seeds: first minus second."""


def pipeline(folder: Path) -> str:
    """Step times by case and device."""
    rows = latest(read_rows(folder / "pipeline.csv"), ("case", "contestant", *PIPELINE_KEY))
    parts = []
    for (case, *_), group in grouped(rows, ("case", *PIPELINE_KEY)):
        first = group[0]
        times = {row["contestant"]: float(row["step_ms"]) for row in group}
        lines = [
            f"**{case}**, {first['dtype']}, batch {first['batch']}; {conditions(first)}",
            "",
            "| | step, ms (20 to 80 %) | turns | speed-up | of the oracle's saving | peak, MiB |",
            "|---|---|---|---|---|---|",
        ]
        for row in group:
            spread = f"{row['step_ms']} ({row['step_ms_20']} to {row['step_ms_80']})"
            share = oracle_share(row["contestant"], times)
            lines.append(
                f"| {row['contestant']} | {spread} | {row['repeats']} | {row['speedup'] or '-'} "
                f"| {share} | {row['peak_mib'] or '-'} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOT_RUN


PIPELINE_KEY = ("device", "dtype", "batch", "threads")


def oracle_share(contestant: str, times: dict[str, float]) -> str:
    """How much of what an oracle saves this contestant saves: a preset's own, else qkv at 50 %."""
    oracle = "oracle-qkv-50"
    if contestant.startswith("preset-"):
        preset = PRESETS[contestant.removeprefix("preset-")]
        oracle = oracle_name(preset.merge, preset.keep_rate)
    is_bound = contestant == "unpatched" or contestant.startswith("oracle")
    if is_bound or not {"unpatched", oracle} <= times.keys():
        return "-"
    most = times["unpatched"] - times[oracle]
    return f"{100 * (times['unpatched'] - times[contestant]) / most:.0f} %" if most > 0 else "-"


def quality(folder: Path) -> str:
    """Change and distance by setting."""
    rows = read_rows(folder / "quality.csv")
    if not rows:
        return NOT_RUN
    first = rows[0]
    times = latest_times(folder)
    timed = [
        f"Time of denoising relative to unmerged in the same run, there {row['ms']} ms per picture "
        f"and step (batch {row['batch']}, {row['steps']} steps, median of {row['repeats']}): "
        f"{conditions(row)}"
        for row in list(times.values())[:1]
    ]
    lines = [
        f"{first['images']} pictures, {first['references']} references; {conditions(first)}",
        *timed,
        "",
        "| setting | cost of attention | PSNR, dB: median (20 to 80 %) | mean ± SE | SSIM "
        "| feature distance | set distance minus unmerged's | time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["setting"], f"{100 * float(row['attention_cost']):.3g} %"]
        if row["psnr_db"]:
            spread = f"({number(row['psnr_db_20'], 1)} to {number(row['psnr_db_80'], 1)})"
            cells += [
                f"{number(row['psnr_db'], 1)} {spread}",
                plus_minus(row, "psnr_mean", "psnr_se", 1),
                plus_minus(row, "ssim_mean", "ssim_se", 3),
                plus_minus(row, "feature_distance", "feature_distance_se", 2),
            ]
        else:
            cells += ["-"] * 4
        is_unmerged = not row["delta"]
        distance = plus_minus(row, "fid", "fid_se", 2) + " (itself)"
        cells += [
            distance if is_unmerged else plus_minus(row, "delta", "delta_se", 2),
            number(times[row["setting"]]["relative"], 2) if row["setting"] in times else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(folder: Path) -> str:
    """Differences of PSNR between settings, picture by picture."""
    values: dict[str, dict[str, float]] = {}
    for row in read_rows(folder / "quality_images.csv"):
        values.setdefault(row["setting"], {})[row["file"]] = float(row["psnr_db"])
    lines = []
    for first, second in PAIRS:
        if first in values and second in values:
            both = values[first].keys() & values[second].keys()
            differences = [values[first][file] - values[second][file] for file in sorted(both)]
            finite = [d for d in differences if isfinite(d)]
            if len(finite) > 1:
                mean, error = statistics.mean(finite), statistics.stdev(finite) / sqrt(len(finite))
                higher = sum(d > 0 for d in finite)
                lines.append(
                    f"| {first} minus {second} | {mean:+.2f} ± {error:.2f} "
                    f"| {higher} of {len(finite)} |"
                )
    if not lines:
        return NOT_RUN
    head = ["| pair | PSNR, dB: mean difference ± SE | higher in |", "|---|---|---|"]
    return "\n".join([*head, *lines])


def key_bias(folder: Path) -> str:
    """Ways to count cluster sizes."""
    key = ("device", "dtype", "batch", "threads", "heads", "width", "queries", "keys")
    rows = latest(read_rows(folder / "key_bias.csv"), ("way", *key))
    parts = []
    for _, group in grouped(rows, key[:4]):
        lines = [
            f"{group[0]['dtype']}, batch {group[0]['batch']}; {conditions(group[0])}",
            "",
            "| heads x width | queries x keys | none, ms | mask | channel |",
            "|---|---|---|---|---|",
        ]
        for _, sizes in grouped(group, key):
            ways = {row["way"]: row for row in sizes}
            one = sizes[0]
            lines.append(
                f"| {one['heads']} x {one['width']} | {one['queries']} x {one['keys']} "
                f"| {ways['none']['ms']} | {ways['mask']['times_none']}x "
                f"| {ways['channel']['times_none']}x |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NOT_RUN


def compiled(folder: Path) -> str:
    """Step times eager and compiled, by case and device."""
    rows = latest(read_rows(folder / "compile.csv"), ("case", "contestant", *PIPELINE_KEY))
    parts = []
    for (case, *_), group in grouped(rows, ("case", *PIPELINE_KEY)):
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


BLOCKS: dict[str, Callable[[Path], str]] = {
    "pipeline": pipeline,
    "compile": compiled,
    "quality": quality,
    "paired": paired,
    "key-bias": key_bias,
}


def latest(rows: Iterable[Row], key: Sequence[str]) -> list[Row]:
    """The last row of each key, in the order in which keys first came."""
    found: dict[tuple[str, ...], Row] = {}
    for row in rows:
        found[tuple(row[name] for name in key)] = row
    return list(found.values())


def grouped(rows: Iterable[Row], key: Sequence[str]) -> list[tuple[tuple[str, ...], list[Row]]]:
    """Rows by key, in the order in which keys first came."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in key), []).append(row)
    return list(groups.items())


def conditions(row: Row) -> str:
    """Device, threads, versions and commit of a row."""
    threads = f", {row['threads']} threads" if not row["device"].startswith("NVIDIA") else ""
    return f"{row['device']}{threads}, torch {row['torch']}, commit {row['commit']}."


def number(text: str, digits: int) -> str:
    """A cell's number, or a dash."""
    return f"{float(text):.{digits}f}" if text else "-"


def plus_minus(row: Row, value: str, error: str, digits: int) -> str:
    """Value and standard error."""
    known = f" ± {number(row[error], digits)}" if row[error] else ""
    return number(row[value], digits) + known


def render(text: str, folder: Path) -> str:
    """The document with every block filled.

    Raises:
        ValueError: a block is missing or unknown.
    """
    names = re.findall(r"<!-- begin (\S+) -->", text)
    if sorted(names) != sorted(BLOCKS):
        raise ValueError(f"the document must have the blocks {', '.join(BLOCKS)}, got {names}.")
    for name, make in BLOCKS.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}\n\n{make(folder)}\n\n{end}{after}"
    return text


def main() -> int:
    """Rewrite or check the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "benchmarks.md")
    parser.add_argument("--rows", type=Path, default=ROOT / "docs" / "benchmarks")
    arguments = parser.parse_args()
    old = arguments.document.read_text(encoding="utf-8")
    new = render(old, arguments.rows)
    return write_or_check(arguments.document, new, check=arguments.check)


if __name__ == "__main__":
    sys.exit(main())
