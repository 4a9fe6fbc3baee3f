"""Time of a UNet call, or of its merged self-attentions alone.

    python scripts/bench.py unet                              SD 1.5 at 512 and 768 px
    python scripts/bench.py unet --part self-attention        only what merging changes
    python scripts/bench.py unet --part self-attention --against COMMIT

Before timing, each contestant is checked on small latents: the output is finite, merging changes
it, and removal restores it to the last bit. Contestants then take turns. A contestant that keeps
partitions for n steps is called twice in a turn, with a new partition and with a kept one; its step
time is the average over n steps.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import against
from benchmarks.cases import CASES
from benchmarks.contestants import CONTESTANTS, UNPATCHED, Contestant, is_bound, oracle_of
from benchmarks.markdown import NOT_RUN, Row, conditions, grouped, latest, table
from benchmarks.options import add_common_options, add_unet_options, build
from benchmarks.rows import MACHINE, append_rows, describe_machine, read_rows
from benchmarks.self_attention import SelfAttentionCalls
from sd_tokenmerge.bench.contestants import Step
from sd_tokenmerge.bench.gate import require_sound
from sd_tokenmerge.bench.turns import milliseconds, spread_columns, take_turns

COLUMNS = (
    *("benchmark", "case", "contestant", "dtype", "batch", "refresh_every", "repeats"),
    *("step_ms", "step_ms_20", "step_ms_80", "fresh_ms", "kept_ms", "speedup"),
    *MACHINE,
)
RUN = ("device", "batch", "threads", "commit")
"""Columns in which the rows of a table agree."""
STEP, SELF_ATTENTION = "unet-step", "self-attention-step"
DEFAULT = (
    *(UNPATCHED, "oracle-qkv-50", "tomesd-50", "preset-paper", "atc-keys-50"),
    *("atc-keys-50-refresh-10", "preset-near-lossless", "preset-balanced", "preset-fast"),
    *("oracle-two-sided-12.5", "oracle-two-sided-6.25", "oracle-two-sided-4"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py unet`."""
    parser.add_argument("--part", choices=["step", "self-attention"], default="step")
    add_unet_options(parser, ["sd15-512", "sd15-768"], DEFAULT)
    add_common_options(parser, minutes=16)
    against.add_option(parser)


def run(arguments: argparse.Namespace) -> str:
    """Measure every case, store the rows, return the table."""
    benchmark = STEP if arguments.part == "step" else SELF_ATTENTION
    if arguments.against:
        cases = [
            against.Case(benchmark, case, "preset-balanced", {"batch": arguments.batch})
            for case in arguments.cases
        ]
        return against.run(cases, arguments)
    rows: list[dict[str, str]] = []
    work = sum(CASES[case].latent ** 2 for case in arguments.cases)
    for case in arguments.cases:
        calls = build(case, arguments)
        contestants = [CONTESTANTS[name] for name in arguments.contestants]
        require_sound(calls, contestants)
        print(f"{case}: checks passed", file=sys.stderr)
        seconds = arguments.minutes * 60 * CASES[case].latent ** 2 / work
        found = measure(benchmark, calls, contestants, seconds, arguments.rounds)
        found = [{**row, "case": case} for row in found]
        if not arguments.quick:
            append_rows(arguments.out / "unet.csv", COLUMNS, found)
        rows += found
        del calls
        gc.collect()
    return times_table(rows)


def measure(
    benchmark: str, calls: Any, contestants: list[Contestant], seconds: float, rounds: int
) -> list[dict[str, str]]:
    """Let the contestants take turns; one row each, without the case.

    Args:
        benchmark: in the rows; `SELF_ATTENTION` times only a part of each call.
        calls: of the UNet.
        contestants: with `UNPATCHED` among them.
        seconds: no round begins that would probably end later than this.
        rounds: maximum number of rounds.
    """
    timed = SelfAttentionCalls(calls) if benchmark == SELF_ATTENTION else calls
    steps = {one.name: Step(timed, one) for one in contestants if one.name != UNPATCHED}
    unpatched = Step(timed, CONTESTANTS[UNPATCHED])
    timings = take_turns((UNPATCHED, unpatched), steps, seconds=seconds, rounds=rounds)
    machine = describe_machine(str(calls.device))
    rows = []
    for name, step in {UNPATCHED: unpatched, **steps}.items():
        taken = timings[name]
        kept = step.costs[1::2] if step.contestant.refresh_every > 1 else []
        fresh = step.costs[::2] if kept else step.costs
        rows.append(
            {
                "benchmark": benchmark,
                "contestant": name,
                "dtype": str(calls.dtype).removeprefix("torch."),
                "batch": str(calls.batch),
                "refresh_every": str(step.contestant.refresh_every),
                "repeats": str(len(taken.costs)),
                **spread_columns("step_ms", taken.seconds),
                "fresh_ms": milliseconds(median(cost.wall for cost in fresh)),
                "kept_ms": milliseconds(median(cost.wall for cost in kept)) if kept else "",
                "speedup": f"{1 / median(taken.relative):.3f}",
                **machine,
            }
        )
    return rows


def step_times(folder: Path) -> str:
    """Times of whole steps by case, device and run."""
    return times_table(row for row in _stored(folder) if row["benchmark"] == STEP)


def self_attention_times(folder: Path) -> str:
    """Times of the merged self-attentions by case, device and run."""
    return times_table(row for row in _stored(folder) if row["benchmark"] == SELF_ATTENTION)


def _stored(folder: Path) -> list[Row]:
    return read_rows(folder / "unet.csv")


def times_table(rows: Iterable[Row]) -> str:
    """A table for each run that is shown: a line for each case, a column for each contestant."""
    parts = []
    for run in grouped(last_runs(list(rows)), RUN):
        names = list(dict.fromkeys(row["contestant"] for row in run))
        names.remove(UNPATCHED)
        lines = [_line(group, names) for group in grouped(run, ("case", "dtype"))]
        head = ["", "", "unmerged, s", "turns", *names]
        parts.append(f"Batch {run[0]['batch']}; {conditions(run)}\n\n{table(head, lines)}")
    return "\n\n".join(parts) or NOT_RUN


def _line(group: Sequence[Row], names: Sequence[str]) -> list[str]:
    found = {row["contestant"]: row for row in group}
    cells = [_speedup(found, name) if name in found else "-" for name in names]
    unpatched, turns = found[UNPATCHED], {found[name]["repeats"] for name in names & found.keys()}
    seconds = f"{float(unpatched['step_ms']) / 1000:.2f}"
    return [unpatched["case"], unpatched["dtype"], seconds, " to ".join(sorted(turns)), *cells]


def _speedup(found: Mapping[str, Row], name: str) -> str:
    """The speed-up, and the share of its time that choosing clusters takes."""
    speedup, oracle = float(found[name]["speedup"]), found.get(oracle_of(name))
    if is_bound(name) or oracle is None:
        return f"{speedup:.2f}x"
    return f"{speedup:.2f}x ({100 * (1 - speedup / float(oracle['speedup'])):.0f} %)"


def last_runs(rows: list[Row]) -> list[Row]:
    """Each contestant's last row, with the unpatched UNet and the oracles of the same run."""
    run = ("case", "dtype", *RUN)
    rows = latest(rows, ("contestant", *run))
    settings = [row for row in rows if not is_bound(row["contestant"])]
    last = latest(settings, ("contestant", "case", "dtype", *RUN[:-1]))
    shown_runs = {tuple(row[name] for name in run) for row in last}
    shown = [
        row
        for row in rows
        if row in last or (is_bound(row["contestant"]) and tuple(row[n] for n in run) in shown_runs)
    ]
    cases = list(dict.fromkeys(row["case"] for row in shown))
    return sorted(shown, key=lambda row: cases.index(row["case"]))
