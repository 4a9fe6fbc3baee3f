"""The speed-up by merging under `torch.compile`: UNet steps, eager and compiled.

    python scripts/bench.py compile                       the sample UNet at 512 px, 10 minutes
    python scripts/bench.py compile --cases sd15-512      a real one: minutes of compiling each

Each contestant is compiled by itself, from empty caches, by inductor with `fullgraph=True`. Its
output must be that of the eager merged UNet. Recompilations are counted over a generation; then the
unpatched eager UNet, the contestant, and the compiled contestant take turns. Speed-ups are over the
unpatched UNet.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache

from benchmarks.contestants import CONTESTANTS, UNPATCHED, Contestant
from benchmarks.markdown import MODEL, Row, case_tables, grouped, latest, number, spread
from benchmarks.options import add_common_options, add_unet_options, build
from benchmarks.rows import MACHINE, append_rows, describe_machine, read_rows
from benchmarks.unet_calls import UNetCalls
from sd_tokenmerge.bench.calls import timed_step
from sd_tokenmerge.bench.turns import Cost, milliseconds, spread_columns, take_turns

COLUMNS = (
    *("benchmark", "case", "contestant", "dtype", "batch", "refresh_every", "repeats"),
    *("unpatched_ms", "eager_ms", "eager_ms_20", "eager_ms_80"),
    *("compiled_ms", "compiled_ms_20", "compiled_ms_80", "eager_speedup", "compiled_speedup"),
    *("compile_s", "graphs", "steps", "recompilations"),
    *MACHINE,
)
DEFAULT = (
    *(UNPATCHED, "oracle-qkv-50", "tome-sd-50", "atc-keys-50-refresh-10"),
    *("oracle-two-sided-12.5", "preset-balanced"),
)
GENERATION = 12
"""Steps of the generation that counts recompilations; more than any partition is kept for."""

_NEAR = 0.2
"""Largest distance to the merged output, relative to that between the merged and the unmerged one.

Rounding differs in a compiled model, and a token may join another cluster.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py compile`."""
    add_unet_options(parser, ["sample-512"], DEFAULT)
    add_common_options(parser, minutes=3)


def run(arguments: argparse.Namespace) -> str:
    """Measure every contestant, store the rows, return the table."""
    rows: list[dict[str, str]] = []
    names = ["preset-balanced"] if arguments.quick else arguments.contestants
    for case in arguments.cases:
        calls = build(case, arguments)
        seconds = arguments.minutes * 60 / len(names) / len(arguments.cases)
        for name in names:
            row = measure(calls, CONTESTANTS[name], seconds, arguments.rounds)
            rows.append(row | {"case": case} | describe_machine(arguments.device))
            print(f"{case}: {name} done", file=sys.stderr)
            if not arguments.quick:
                append_rows(arguments.out / "compile.csv", COLUMNS, rows[-1:])
    return compile_table(rows)


def measure(calls: UNetCalls, one: Contestant, seconds: float, rounds: int) -> dict[str, str]:
    """Compile one contestant, run a generation, take turns; returns its row.

    Raises:
        SystemExit: the compiled UNet does not merge as the eager one does.
    """
    torch._dynamo.reset()
    unet, size = calls.denoiser, (calls.latent, calls.latent)
    shared = {id(tensor): tensor for tensor in [*unet.parameters(), *unet.buffers()]}
    unpatched = copy.deepcopy(unet, shared)  # another model of the same weights
    with fresh_inductor_cache(), one.on(unet):
        compiled = torch.compile(unet, fullgraph=True)
        counters.clear()
        first = calls.timed(calls.timesteps()[0], compiled)
        graphs = counters["stats"]["unique_graphs"]
        for timestep in calls.timesteps()[:GENERATION]:
            calls.timed(timestep, compiled)
        recompilations = counters["stats"]["unique_graphs"] - graphs
        if one.name != UNPATCHED:
            got, merged, plain = (
                calls.call(calls.timesteps()[10], size, module)
                for module in (compiled, unet, unpatched)
            )
            distance = float((got - merged).norm() / (plain - merged).norm())
            if not distance < _NEAR:
                sys.exit(f"{one.name}, compiled: off by {distance:.2g} of what merging changes.")
        runs = {
            name: _step(calls, module, one.refresh_every)
            for name, module in {"eager": unet, "compiled": compiled}.items()
        }
        timings = take_turns(
            (UNPATCHED, _step(calls, unpatched, 1)), runs, seconds=seconds, rounds=rounds
        )
    eager, fast = timings["eager"], timings["compiled"]
    return {
        "benchmark": "compile",
        "contestant": one.name,
        "dtype": str(calls.dtype).removeprefix("torch."),
        "batch": str(calls.batch),
        "refresh_every": str(one.refresh_every),
        "repeats": str(len(fast.costs)),
        "unpatched_ms": milliseconds(median(timings[UNPATCHED].seconds)),
        **spread_columns("eager_ms", eager.seconds),
        **spread_columns("compiled_ms", fast.seconds),
        "eager_speedup": f"{1 / median(eager.relative):.3f}",
        "compiled_speedup": f"{1 / median(fast.relative):.3f}",
        "compile_s": f"{first.wall - median(fast.seconds):.1f}",
        "graphs": str(graphs),
        "steps": str(GENERATION),
        "recompilations": str(recompilations),
    }


class _ModuleCalls:
    """Calls of one module made of the UNet."""

    def __init__(self, calls: UNetCalls, module: Any) -> None:
        self._calls, self._module, self.timesteps = calls, module, calls.timesteps

    def timed(self, timestep: torch.Tensor) -> Cost:
        return self._calls.timed(timestep, self._module)


def _step(calls: UNetCalls, module: Any, refresh_every: int) -> Callable[[], Cost]:
    module_calls = _ModuleCalls(calls, module)
    return lambda: timed_step(module_calls, refresh_every)[0]


def compile_times(folder: Path) -> str:
    """Step times, eager and compiled, by case and device."""
    return compile_table(read_rows(folder / "compile.csv"))


def compile_table(rows: list[Row]) -> str:
    """A table for each case and device."""
    groups = grouped(latest(rows, ("case", "contestant", *MODEL)), ("case", *MODEL))
    head = ["", "eager, ms (20 to 80 %)", "speed-up", "compiled, ms (20 to 80 %)", "speed-up"]
    head += ["over compiled unpatched", "compiling, s", "graphs", "compiled again in a generation"]
    return case_tables(groups, head, _lines)


def _lines(group: Sequence[Row]) -> Iterator[list[str]]:
    speedups = {row["contestant"]: float(row["compiled_speedup"]) for row in group}
    for row in group:
        name, over = row["contestant"], "-"
        if name != UNPATCHED and UNPATCHED in speedups:
            over = f"{speedups[name] / speedups[UNPATCHED]:.2f}"
        eager = [spread(row, "eager_ms"), number(row["eager_speedup"], 2)]
        fast = [spread(row, "compiled_ms"), number(row["compiled_speedup"], 2), over]
        again = f"{row['recompilations']} in {row['steps']} steps"
        yield [name, *eager, *fast, number(row["compile_s"], 0), row["graphs"], again]
