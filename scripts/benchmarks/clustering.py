"""Time and memory of clustering tokens.

    python scripts/bench.py clustering                    about 8 minutes on two cores
    python scripts/bench.py clustering --only speed       or small, methods, growth
    python scripts/bench.py clustering --against COMMIT   this tree beside that commit

`limit` is just one exact nearest-neighbour search over all tokens: a blocked float32 product and an
arg-max. The contestants of a case take turns, with the limit in between. Other
libraries cluster one image of the batch, as they take one at a time; all times are per image.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks import against
from benchmarks.markdown import NOT_RUN, Row, counted, grouped, latest, table
from benchmarks.memory_trace import trace_memory
from benchmarks.options import add_common_options
from benchmarks.rows import MACHINE, append_rows, describe_machine, read_rows
from benchmarks.tokens import BASELINES, Tokens, limit
from sd_tokenmerge import METHODS, Grid, parse_method
from sd_tokenmerge.bench.turns import Cost, take_turns, timed

COLUMNS = (
    *("benchmark", "contestant", "batch", "tokens", "channels", "kind", "clusters"),
    *("repeats", "ms_per_image", "fastest_ms", "slowest_ms", "times_limit", "peak_mib"),
    *MACHINE,
)
SHARES = {"speed": 0.5, "small": 0.1, "methods": 0.2, "growth": 0.2}
LINKAGES = ("average", "complete", "single")
GROWTH_GRIDS = (32, 64, 96, 128)
CASE = ("device", "threads", "batch", "tokens", "channels", "kind")

Run = Callable[[], Cost]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py clustering`."""
    parser.add_argument("--only", nargs="+", choices=list(SHARES), default=list(SHARES))
    add_common_options(parser, minutes=7)
    against.add_option(parser)


def run(arguments: argparse.Namespace) -> str:
    """Measure, store the rows, return the tables."""
    side, few, widths = (12, 8, (16,)) if arguments.quick else (64, 32, (320, 40))
    fields = [Tokens(2, side, c, kind) for c in widths for kind in ("smooth", "white")]
    if arguments.against:
        cases = [
            against.Case("clustering", name_of(field.columns()), method, {"case": asdict(field)})
            for field in fields
            for method in map(method_of, LINKAGES)
        ]
        return against.run(cases, arguments)
    rows: list[dict[str, str]] = []
    share = arguments.minutes * 60 / sum(SHARES[name] for name in arguments.only)
    for name in arguments.only:
        if name == "growth":
            grids = (8, 12) if arguments.quick else GROWTH_GRIDS
            found = [
                growth(method_of(linkage), Tokens(1, grid, widths[0]), arguments.device)
                for linkage in LINKAGES
                for grid in grids
            ]
        else:
            chosen = {
                "speed": fields,
                "small": [Tokens(b, few, 48, k) for b in (2, 24) for k in ("smooth", "white")],
                "methods": [Tokens(2, side, channels) for channels in widths],
            }[name]
            seconds = share * SHARES[name] / len(chosen)
            found = [
                row
                for field in chosen
                for row in compare(name, field, arguments.device, seconds, arguments.rounds)
            ]
        machine = describe_machine(arguments.device)
        found = [dict.fromkeys(COLUMNS, "") | row | machine for row in found]
        if not arguments.quick:
            append_rows(arguments.out / "clustering.csv", COLUMNS, found)
        rows += found
    return tables(rows)


def compare(
    benchmark: str, field: Tokens, device: str, seconds: float, rounds: int
) -> list[dict[str, str]]:
    """Let the contestants of a benchmark take turns; one row each."""
    tokens = field.draw(device)
    images = {"limit": field.batch}
    runs: dict[str, Run] = {}
    for name in METHODS if benchmark == "methods" else map(method_of, LINKAGES):
        images[name] = field.batch
        runs[name] = _run_of(name, tokens, field)
    if benchmark == "speed" and device == "cpu":
        for library, cluster in BASELINES.items():
            for linkage in LINKAGES:
                name = f"{library} {linkage}"
                images[name] = 1
                runs[name] = partial(timed, partial(cluster, tokens[0], field.clusters, linkage))
    for name, run_once in runs.items():
        if images[name] > 1:
            run_once()  # a warm-up
    timings = take_turns(
        ("limit", lambda: timed(lambda: limit(tokens))),
        runs,
        seconds=seconds,
        rounds=rounds,
        least=min(3, rounds),
    )
    return [
        {
            "benchmark": benchmark,
            "contestant": name,
            **field.columns(),
            **times_of([second / images[name] for second in taken.seconds]),
            "times_limit": f"{median(taken.relative) * field.batch / images[name]:.2f}",
        }
        for name, taken in timings.items()
    ]


def _run_of(name: str, tokens: Tensor, field: Tokens) -> Run:
    method, grid = parse_method(name), Grid(field.grid, field.grid)
    scores = tokens.norm(dim=-1) if method.uses_scores else None
    cluster = partial(method, tokens, field.clusters, grid=grid, scores=scores)
    return partial(timed, cluster)


def method_of(linkage: str) -> str:
    """The method string of a linkage."""
    return f"atc:linkage={linkage}"


def times_of(seconds: Sequence[float]) -> dict[str, str]:
    """Median and range in milliseconds, to three digits."""
    return {
        "repeats": str(len(seconds)),
        "ms_per_image": f"{median(seconds) * 1e3:.3g}",
        "fastest_ms": f"{min(seconds) * 1e3:.3g}",
        "slowest_ms": f"{max(seconds) * 1e3:.3g}",
    }


def growth(method: str, field: Tokens, device: str) -> dict[str, str]:
    """One method on one image of a size: time, and bytes of tensors at the peak."""
    run = _run_of(method, field.draw(device), field)
    memory = trace_memory(run, torch.device(device)).peak
    times = [run().wall for _ in range(5 if field.grid <= 64 else 1)]
    return {
        "benchmark": "growth",
        "contestant": method,
        **field.columns(),
        **times_of(times),
        "peak_mib": f"{memory / 2**20:.0f}",
    }


def clustering_times(folder: Path) -> str:
    """All tables of docs/clustering.md."""
    return tables(read_rows(folder / "clustering.csv"))


def tables(rows: list[Row]) -> str:
    """Tables by device; of rows with the same conditions, the last one counts."""
    parts = []
    for here in grouped(latest(rows, ("benchmark", "contestant", *CASE)), ("device",)):
        first, commits = here[0], ", ".join(dict.fromkeys(row["commit"] for row in here))
        parts.append(
            f"**{first['device']}**, {counted(first['threads'], 'thread')}, torch "
            f"{first['torch']}; commit {commits}. Keep rate 0.5."
        )
        for benchmark, make in TABLES.items():
            chosen = [row for row in here if row["benchmark"] == benchmark]
            if chosen:
                parts.append(make(chosen))
    if rows and not any(row["device"].startswith("NVIDIA") for row in rows):
        parts.append("**On a GPU**: not run.")
    return "\n\n".join(parts) or NOT_RUN


def speed_table(rows: list[Row]) -> str:
    """Linkages against the limit and other libraries."""
    lines = []
    for case in grouped(rows, CASE):
        times = {row["contestant"]: row for row in case}
        lines.append([name_of(case[0]), "(limit)", _range(times["limit"]), "1", *"---"])
        for linkage in LINKAGES:
            row = times[method_of(linkage)]
            gains = [
                f"{float(times[name]['ms_per_image']) / float(row['ms_per_image']):.1f}x"
                if (name := f"{library} {linkage}") in times
                else "-"
                for library in BASELINES
            ]
            cells = [name_of(row), linkage, _range(row), f"{row['times_limit']}x", *gains]
            lines.append(cells)
    head = ["tokens", "linkage", "ms", "of the limit", *BASELINES]
    return (
        "Milliseconds per image, median (fastest to slowest); multiple of the limit; times faster "
        f"than other libraries:\n\n{table(head, lines)}"
    )


def small_table(rows: list[Row]) -> str:
    """Few tokens, where calls cost more than arithmetic."""
    lines = []
    for case in grouped(rows, CASE):
        times = {row["contestant"]: row["ms_per_image"] for row in case}
        linkages = [times[method_of(linkage)] for linkage in LINKAGES]
        lines.append([name_of(case[0]), times["limit"], *linkages])
    head = ["tokens", "limit", *LINKAGES]
    return f"Few tokens, milliseconds per image:\n\n{table(head, lines)}"


def methods_table(rows: list[Row]) -> str:
    """Every method at the same sizes."""
    cases = grouped(rows, CASE)
    times = [{row["contestant"]: row["ms_per_image"] for row in case} for case in cases]
    names = dict.fromkeys(row["contestant"] for row in rows)
    lines = [[name, *(case.get(name, "-") for case in times)] for name in names]
    head = ["method", *(name_of(case[0]) for case in cases)]
    return f"Every method with its defaults, milliseconds per image:\n\n{table(head, lines)}"


def growth_table(rows: list[Row]) -> str:
    """Time and memory by number of tokens."""
    lines = []
    for same in grouped(rows, ("tokens",)):
        cells = {
            row["contestant"]: f"{float(row['ms_per_image']) / 1e3:.3g} s, {row['peak_mib']} MiB"
            for row in same
        }
        linkages = [cells.get(method_of(linkage), "-") for linkage in LINKAGES]
        lines.append([f"{int(same[0]['tokens']):,}", *linkages])
    head = [f"tokens, C = {rows[0]['channels']}", *LINKAGES]
    return (
        "One image of smooth tokens: time, and most memory at a time (the tokens themselves not "
        f"included):\n\n{table(head, lines)}"
    )


TABLES = {
    "speed": speed_table,
    "small": small_table,
    "growth": growth_table,
    "methods": methods_table,
}


def costs(folder: Path) -> str:
    """A sentence: each method's time to choose clusters, at the largest size."""
    timed_rows = [
        row for row in read_rows(folder / "clustering.csv") if row["benchmark"] == "methods"
    ]
    if not timed_rows:
        return NOT_RUN
    same = [row for row in timed_rows if name_of(row) == name_of(timed_rows[-1])]
    last = {row["contestant"]: row for row in same}
    bound = last.pop("limit")
    times = ", ".join(f"`{name}` {row['ms_per_image']}" for name, row in last.items())
    return (
        f"Choosing half of {int(bound['tokens']):,} tokens of {bound['channels']} channels takes, "
        f"in milliseconds per image: {times}; one exact nearest-neighbour\nsearch: "
        f"{bound['ms_per_image']} ({bound['device']}, {counted(bound['threads'], 'thread')})."
    )


def name_of(row: Row) -> str:
    """A description of the clustered tokens."""
    return f"{row['batch']} x {int(row['tokens']):,} x {row['channels']} {row['kind']}"


def _range(row: Row) -> str:
    return f"{row['ms_per_image']} ({row['fastest_ms']} to {row['slowest_ms']})"
