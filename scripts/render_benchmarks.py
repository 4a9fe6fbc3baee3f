"""Fill the marked blocks of docs/benchmarks.md and README.md from the committed rows.

    python scripts/render_benchmarks.py            # rewrite the documents
    python scripts/render_benchmarks.py --check    # fail where one differs from its rows

A block is what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Of rows with the same
conditions, the last one counts.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Mapping
from math import isfinite, sqrt
from pathlib import Path

from bench_rows import read_rows, write_or_check
from bench_tables import NOT_RUN, conditions, latest, number, plus_minus, table
from plot_quality import latest_times
from render_times import attention, compiled, images, memory, pipeline

from sd_tokenmerge import PRESETS

ROOT = Path(__file__).resolve().parents[1]

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


def psnr_differences(folder: Path, first: str, second: str) -> list[float]:
    """PSNR of one setting's pictures minus that of another's, where both differ from unmerged."""
    values: dict[str, dict[str, float]] = {first: {}, second: {}}
    for row in read_rows(folder / "quality_images.csv"):
        if row["setting"] in values:
            values[row["setting"]][row["file"]] = float(row["psnr_db"])
    both = values[first].keys() & values[second].keys()
    differences = [values[first][file] - values[second][file] for file in sorted(both)]
    return [value for value in differences if isfinite(value)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error, of two values or more."""
    return statistics.mean(values), statistics.stdev(values) / sqrt(len(values))


def paired(folder: Path) -> str:
    """Differences of PSNR between settings, picture by picture."""
    lines = []
    for first, second in PAIRS:
        found = psnr_differences(folder, first, second)
        if len(found) > 1:
            mean, error = mean_and_error(found)
            higher = f"{sum(value > 0 for value in found)} of {len(found)}"
            lines.append([f"{first} minus {second}", f"{mean:+.2f} ± {error:.2f}", higher])
    if not lines:
        return NOT_RUN
    return table(["pair", "PSNR, dB: mean difference ± SE", "higher in"], lines)


def presets(folder: Path) -> str:
    """README's table: what the presets and tomesd save and change."""
    steps = latest(read_rows(folder / "pipeline.csv"), ("case", "contestant"))
    speedups = {(row["case"], row["contestant"]): row["speedup"] for row in steps}
    quality_rows = {row["setting"]: row for row in read_rows(folder / "quality.csv")}
    if not speedups or not quality_rows:
        return NOT_RUN
    lines = []
    for what, keep_rate, contestant, setting in RECOMMENDED:
        cells = [what, f"{100 * keep_rate:g} %"]
        for case in ("sd15-512", "sd15-768"):
            speedup = speedups.get((case, contestant))
            cells.append(f"{float(speedup):.2f}x" if speedup else "-")
        if setting is None:
            lines.append([*cells, "(same clusters)", ""])
            continue
        found = psnr_differences(folder, setting, PEER)
        closer = "0"
        if setting != PEER:
            closer = "{:+.1f} ± {:.1f} dB".format(*mean_and_error(found)) if found else "-"
        row = quality_rows.get(setting)
        change = f"{float(row['delta']):+.1f} ± {number(row['delta_se'], 1)}" if row else "-"
        lines.append([*cells, closer, change])
    head = ["", "tokens kept", "512 px", "768 px"]
    head += ["PSNR, minus that of `tomesd` at 50 %", "set distance, minus unmerged's"]
    return table(head, lines, numbers=4)


PEER = "tomesd-50"
RECOMMENDED = (
    *(
        (f'`preset="{name}"`', PRESETS[name].keep_rate, f"preset-{name}", f"preset-{name}")
        for name in ("balanced", "fast")
    ),
    ("the `tomesd` package", 0.5, PEER, PEER),
    ("the `tomesd` package", 0.25, "tomesd-25", "tomesd-25"),
    (
        '`preset="exact"`: ATC as in its paper',
        PRESETS["exact"].keep_rate,
        "preset-exact",
        "qkv-50",
    ),
    ("the same by scikit-learn, as in the paper's code", 0.5, "scikit-learn-atc-50", None),
)
"""README's rows: name, keep rate, contestant of `bench_pipeline`, setting of `bench_quality`."""


Blocks = Mapping[str, Callable[[Path], str]]
BLOCKS: Blocks = {
    "pipeline": pipeline,
    "attention": attention,
    "image": images,
    "memory": memory,
    "compile": compiled,
    "quality": quality,
    "paired": paired,
}
DOCUMENTS: Mapping[Path, Blocks] = {
    ROOT / "docs" / "benchmarks.md": BLOCKS,
    ROOT / "README.md": {"presets": presets},
}


def render(text: str, folder: Path, blocks: Blocks = BLOCKS) -> str:
    """The document with these blocks filled.

    Raises:
        ValueError: one of them is not there once.
    """
    names = re.findall(r"<!-- begin (\S+) -->", text)
    for name, make in blocks.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if names.count(name) != 1 or text.count(end) != 1:
            raise ValueError(f"the document must have the blocks {', '.join(blocks)}, got {names}.")
        before, rest = text.split(begin)
        after = rest.split(end)[1]
        text = f"{before}{begin}\n\n{make(folder)}\n\n{end}{after}"
    return text


def main() -> int:
    """Rewrite or check the documents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rows", type=Path, default=ROOT / "docs" / "benchmarks")
    arguments = parser.parse_args()
    return max(
        write_or_check(
            document,
            render(document.read_text(encoding="utf-8"), arguments.rows, blocks),
            check=arguments.check,
        )
        for document, blocks in DOCUMENTS.items()
    )


if __name__ == "__main__":
    sys.exit(main())
