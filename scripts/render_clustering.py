"""Fill the measured parts of docs/clustering.md and README.md from the committed rows.

    python scripts/render_clustering.py            # rewrite the documents
    python scripts/render_clustering.py --check    # fail where one differs from its rows

A part is what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`. Of rows with the same
conditions, the last one counts.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench_rows import read_rows, write_or_check
from bench_tables import counted

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (ROOT / "docs" / "clustering.md", ROOT / "README.md")
NOT_RUN = "Not run."
LINKAGES = ("average", "complete", "single")
BASELINES = ("scikit-learn", "SciPy", "fastcluster")
CASE = ("device", "threads", "batch", "tokens", "channels", "kind")

Row = dict[str, str]


def main() -> int:
    """Rewrite or check the documents."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument(
        "--rows", type=Path, default=ROOT / "docs" / "benchmarks" / "clustering.csv"
    )
    arguments = parser.parse_args()
    rows = read_rows(arguments.rows)
    return max(
        write_or_check(document, render(document.read_text("utf-8"), rows), check=arguments.check)
        for document in DOCUMENTS
    )


def render(text: str, rows: list[Row]) -> str:
    """A document with its part made from the rows.

    Raises:
        ValueError: it has none.
    """
    names = "|".join(PARTS)
    block = re.compile(rf"<!-- begin ({names}) -->\n.*?<!-- end \1 -->", re.DOTALL)
    text, count = block.subn(
        lambda m: f"<!-- begin {m[1]} -->\n\n{PARTS[m[1]](rows)}\n\n<!-- end {m[1]} -->", text
    )
    if not count:
        raise ValueError(f"a document must have one of the parts {', '.join(PARTS)}.")
    return text


def measured(rows: list[Row]) -> str:
    """All tables, by device."""
    latest = {tuple(row[name] for name in ("benchmark", "contestant", *CASE)): row for row in rows}
    parts = []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in latest.values() if row["device"] == device]
        first, commits = here[0], ", ".join(dict.fromkeys(row["commit"] for row in here))
        parts.append(
            f"**{device}**, {counted(first['threads'], 'thread')}, torch {first['torch']}, "
            f"{first['versions']}; commit {commits}. Keep rate 0.5."
        )
        parts += [
            make([row for row in here if row["benchmark"] == benchmark])
            for benchmark, make in TABLES.items()
            if any(row["benchmark"] == benchmark for row in here)
        ]
    if not any(row["device"].startswith("NVIDIA") for row in rows):
        parts.append(f"**On a GPU**: {NOT_RUN[0].lower()}{NOT_RUN[1:]}")
    return "\n\n".join(parts) if rows else NOT_RUN


def speed(rows: list[Row]) -> str:
    """Linkages against the limit and the baselines."""
    lines = [
        "Milliseconds per image, median (fastest to slowest); how many times the limit; how many",
        "times faster than the baselines:",
        "",
        *table_head("tokens", "linkage", "ms", "of the limit", *BASELINES),
    ]
    for _, case in by_case(rows):
        times = {row["contestant"]: row for row in case}
        lines.append(table_row([name_of(case[0]), "(limit)", spread(times["limit"]), *"1---"]))
        for linkage in LINKAGES:
            row = times[f"sd_tokenmerge {linkage}"]
            gains = [
                f"{float(times[name]['ms_per_image']) / float(row['ms_per_image']):.1f}x"
                if (name := f"{baseline} {linkage}") in times
                else "-"
                for baseline in BASELINES
            ]
            cells = [name_of(row), linkage, spread(row), f"{row['times_limit']}x", *gains]
            lines.append(table_row(cells))
    return "\n".join(lines)


def small(rows: list[Row]) -> str:
    """Few tokens, where calls cost more than arithmetic."""
    lines = ["Few tokens, milliseconds per image:", ""]
    lines += table_head("tokens", "limit", *LINKAGES)
    for _, case in by_case(rows):
        times = {row["contestant"]: row for row in case}
        cells = [f"{times[f'sd_tokenmerge {linkage}']['ms_per_image']}" for linkage in LINKAGES]
        lines.append(table_row([name_of(case[0]), times["limit"]["ms_per_image"], *cells]))
    return "\n".join(lines)


def methods(rows: list[Row]) -> str:
    """Every method at the same size."""
    lines = ["Every method with its defaults, milliseconds per image:", ""]
    cases = by_case(rows)
    lines += table_head("method", *(name_of(case[0]) for _, case in cases))
    for name in dict.fromkeys(row["contestant"] for row in rows):
        found = [
            next((row["ms_per_image"] for row in case if row["contestant"] == name), "-")
            for _, case in cases
        ]
        lines.append(table_row([name, *found]))
    return "\n".join(lines)


def growth(rows: list[Row]) -> str:
    """Time and memory by number of tokens."""
    lines = [
        "One image of smooth tokens, time and what the process grew by at its peak (the tokens",
        "themselves not included):",
        "",
    ]
    lines += table_head(f"tokens, C = {rows[0]['channels']}", *LINKAGES)
    for count in dict.fromkeys(row["tokens"] for row in rows):
        times = {row["contestant"]: row for row in rows if row["tokens"] == count}
        cells = [
            f"{float(row['ms_per_image']) / 1e3:.3g} s, {row['peak_mib']} MiB"
            if (row := times.get(f"sd_tokenmerge {linkage}"))
            else "-"
            for linkage in LINKAGES
        ]
        lines.append(table_row([f"{int(count):,}", *cells]))
    return "\n".join(lines)


TABLES = {"speed": speed, "small": small, "growth": growth, "methods": methods}


def costs(rows: list[Row]) -> str:
    """A sentence: what choosing clusters costs with each method, where most tokens are."""
    timed = [row for row in rows if row["benchmark"] == "methods"]
    if not timed:
        return NOT_RUN
    latest = {row["contestant"]: row for row in timed if name_of(row) == name_of(timed[-1])}
    limit = latest.pop("limit")
    times = ", ".join(f"`{name}` {row['ms_per_image']}" for name, row in latest.items())
    return (
        f"Choosing half of {int(limit['tokens']):,} tokens of {limit['channels']} channels takes, "
        f"in milliseconds per image: {times}; one exact nearest-neighbour\nsearch: "
        f"{limit['ms_per_image']} ({limit['device']}, {counted(limit['threads'], 'thread')}; "
        f"[all sizes](docs/clustering.md#measured))."
    )


PARTS = {"clustering": measured, "costs": costs}


def by_case(rows: list[Row]) -> list[tuple[tuple[str, ...], list[Row]]]:
    """Rows of the same tokens, in the order in which they first came."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in CASE), []).append(row)
    return list(cases.items())


def name_of(row: Row) -> str:
    """What was clustered."""
    return f"{row['batch']} x {int(row['tokens']):,} x {row['channels']} {row['kind']}"


def spread(row: Row) -> str:
    """Median and range."""
    return f"{row['ms_per_image']} ({row['fastest_ms']} to {row['slowest_ms']})"


def table_head(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [table_row(names), "|" + "---|" * len(names)]


def table_row(cells: Sequence[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())
