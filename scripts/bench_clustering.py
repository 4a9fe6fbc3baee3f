"""Time agglomerative clustering against its baselines, and every merging method.

    python scripts/bench_clustering.py                # about 8 minutes on two cores
    python scripts/bench_clustering.py --only speed   # or small, methods, growth
    python scripts/bench_clustering.py --quick        # tiny inputs: does it run?

`limit` is one exact nearest-neighbour search over all tokens and nothing else: a blocked float32
product and an arg-max. The contestants of a case take turns, in another order every time, until the
case's share of the time is used up; the median is what counts. Baselines take one image of the
batch, as they cannot take more; all times are per image.

Rows are appended to docs/benchmarks/clustering.csv; `scripts/render_clustering.py` puts them into
docs/clustering.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_rows import MACHINE_FIELDS, append_rows, describe_machine
from clustering_contestants import Case, Contestant, Row, all_methods, contestants

from sd_tokenmerge.kernels.agglomerative import LINKAGES, agglomerative_labels

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "benchmarks" / "clustering.csv"
FIELDS = (
    *("benchmark", "contestant", "batch", "tokens", "channels", "kind", "clusters"),
    *("repeats", "ms_per_image", "fastest_ms", "slowest_ms", "times_limit", "peak_mib"),
    *MACHINE_FIELDS,
)
PACKAGES = ("numpy", "scikit-learn", "scipy", "fastcluster")
SHARES = {"speed": 0.5, "small": 0.1, "methods": 0.2, "growth": 0.2}
GROWTH_GRIDS = (32, 64, 96, 128)


def compare(benchmark: str, case: Case, entered: list[Contestant], seconds: float) -> list[Row]:
    """Let the contestants take turns, three at least; one row each."""
    taken: dict[str, list[float]] = {contestant.name: [] for contestant in entered}
    for contestant in entered:
        if contestant.warms_up:
            contestant.run()
    start, turn = time.perf_counter(), 0
    while turn < 3 or (turn < 25 and time.perf_counter() - start < seconds * turn / (turn + 1)):
        first = turn * 5 % len(entered)
        for contestant in entered[first:] + entered[:first]:
            taken[contestant.name].append(timed(contestant.run) / contestant.images)
        turn += 1
    at_limit = statistics.median(taken["limit"])
    return [
        {
            "benchmark": benchmark,
            "contestant": name,
            **case.columns(),
            **summary(times),
            "times_limit": f"{statistics.median(times) / at_limit:.2f}",
        }
        for name, times in taken.items()
    ]


def timed(run: Callable[[], object]) -> float:
    """Seconds until the result is there."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def summary(times: list[float]) -> Row:
    """Median and range in milliseconds, to three digits."""
    return {
        "repeats": len(times),
        "ms_per_image": f"{statistics.median(times) * 1e3:.3g}",
        "fastest_ms": f"{min(times) * 1e3:.3g}",
        "slowest_ms": f"{max(times) * 1e3:.3g}",
    }


def growth(linkage: str, grid: int, channels: int, device: str) -> Row:
    """One linkage at one size; the memory is what the process grew by at its peak."""
    small = Case(1, 24, channels)
    agglomerative_labels(small.tokens(device), small.clusters, linkage)  # loads what loads once
    case = Case(1, grid, channels)
    tokens = case.tokens(device)
    gc.collect()
    before = start_of_memory(device)
    repeats = 5 if grid <= 64 else 1
    times = [
        timed(lambda: agglomerative_labels(tokens, case.clusters, linkage)) for _ in range(repeats)
    ]
    return {
        "benchmark": "growth",
        "contestant": f"sd_tokenmerge {linkage}",
        **case.columns(),
        **summary(times),
        "peak_mib": f"{(peak_memory(device) - before) / 2**20:.0f}",
    }


def start_of_memory(device: str) -> int:
    """Bytes in use now, resident on the CPU, allocated on a GPU; the peak starts anew here."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_memory(device: str) -> int:
    """The most bytes there have been in use since."""
    return torch.cuda.max_memory_allocated() if device != "cpu" else resident("VmHWM")


def resident(name: str) -> int:
    """A line of Linux' account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def growth_alone(linkage: str, grid: int, channels: int, arguments: argparse.Namespace) -> Row:
    """`growth` in a process of its own, whose memory nothing else has touched."""
    command = [sys.executable, __file__, "--one", linkage, str(grid), str(channels)]
    command += ["--device", arguments.device, "--threads", str(arguments.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: Row = json.loads(done.stdout)
    return row


def measure(arguments: argparse.Namespace) -> Iterator[list[Row]]:
    """Rows, as soon as a case is done."""
    quick, device = arguments.quick, arguments.device
    side, small_side, seconds = (12, 8, 0.0) if quick else (64, 32, arguments.minutes * 60)
    share = seconds / sum(SHARES[name] for name in arguments.only)
    widths = (16,) if quick else (320, 40)
    for name in arguments.only:
        if name == "speed":
            for case in (Case(2, side, c, k) for c in widths for k in ("smooth", "white")):
                entered = contestants(case, device, baselines=True)
                yield compare(name, case, entered, share * SHARES[name] / 2 / len(widths))
        elif name == "small":
            for case in (Case(b, small_side, 48, k) for b in (2, 24) for k in ("smooth", "white")):
                entered = contestants(case, device, baselines=False)
                yield compare(name, case, entered, share * SHARES[name] / 4)
        elif name == "methods":
            for case in (Case(2, side, c) for c in widths):
                entered = all_methods(case, device)
                yield compare(name, case, entered, share * SHARES[name] / len(widths))
        else:
            for linkage in LINKAGES:
                for grid in (8, 12) if quick else GROWTH_GRIDS:
                    yield [growth_alone(linkage, grid, widths[0], arguments)]


def main() -> None:
    """Measure, print a table, append the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--minutes", type=float, default=7.0, help="growth takes what it takes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--quick", action="store_true", help="tiny inputs; saved only to another `--out`"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.one:
        linkage, grid, channels = arguments.one
        print(json.dumps(growth(linkage, int(grid), int(channels), arguments.device)))
        return
    versions = " ".join(f"{name}={importlib.metadata.version(name)}" for name in PACKAGES)
    for rows in measure(arguments):
        machine = {**describe_machine(arguments.device), "versions": versions}
        complete = [{field: {**row, **machine}.get(field, "") for field in FIELDS} for row in rows]
        for row in complete:
            print(
                f"{row['benchmark']:8} {row['batch']:>3} x {row['tokens']:>5} x "
                f"{row['channels']:>4} {row['kind']:6} {row['contestant']:38} "
                f"{row['ms_per_image']:>8} ms "
                f"{row['times_limit']:>7} {row['peak_mib']:>6}",
                flush=True,
            )
        if not arguments.quick or arguments.out != OUT:
            append_rows(arguments.out, FIELDS, complete)


if __name__ == "__main__":
    main()
