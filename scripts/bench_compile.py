"""What `torch.compile` leaves of merging's speed-up: UNet steps, eager and compiled.

    python scripts/bench_compile.py                     # the sample UNet at 512 px
    python scripts/bench_compile.py --case sd15-512     # a real one: minutes of compiling each
    python scripts/bench_compile.py --quick             # a tiny model: does it run?

Each contestant is compiled by itself, from empty caches, by inductor with `fullgraph=True`. Before
timing it is checked that a UNet which is compiled and then patched merges, that one which is
patched and then compiled merges, that the first is whole again without the patch, and that
inductor's output is the merged one. Then a generation is walked through, to count what is compiled
on the way. Last, three take turns: the unpatched UNet, the contestant, and the contestant compiled.
Speed-ups are over the unpatched, uncompiled UNet of the same turns.

Rows are appended to a CSV file; `scripts/render_benchmarks.py` puts them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from bench_rows import MACHINE_FIELDS, append_rows, describe_machine, percentile
from pipeline_contestants import CONTESTANTS, Contestant, oracle_name
from timed_unet import (
    CASES,
    QUICK,
    TimedUNet,
    add_model_arguments,
    build_unet,
    milliseconds,
    read_config,
)
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_inductor_cache
from unet_gate import SMALL

from sd_tokenmerge import PRESETS
from sd_tokenmerge.cli.quiet import quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    *("benchmark", "case", "contestant", "dtype", "batch", "refresh_every", "repeats"),
    *("unpatched_ms", "eager_ms", "eager_ms_20", "eager_ms_80"),
    *("compiled_ms", "compiled_ms_20", "compiled_ms_80", "eager_speedup", "compiled_speedup"),
    *("compile_s", "graphs", "steps", "recompilations"),
    *MACHINE_FIELDS,
)
SAMPLE, SAMPLE_LATENT = "sample-512", 64
DEFAULT = (
    "unpatched",
    "oracle-qkv-50",
    "tome-sd-50",
    "atc-keys-50-refresh-10",
    oracle_name(PRESETS["balanced"].merge, PRESETS["balanced"].keep_rate),
    "preset-balanced",
)
QUICK_CONTESTANTS = ("unpatched", "atc-keys-50-refresh-10")
GENERATION = 12
"""Steps of the generation that is walked through: more than a partition is kept for."""

_NEAR = 0.2
"""Most distance from the merged output, over that between the merged and the unmerged one.

Rounding differs in a compiled model, and a token may join another cluster; unmerged, it is 1.
"""


class Bench:
    """One UNet, its contestants eager and compiled."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        """Build the UNet."""
        self.name = name
        self.arguments = arguments
        if name == SAMPLE:
            config = read_config(ROOT / "samples", "pipeline")
            model = (arguments.batch, arguments.device, arguments.dtype)
            self.calls = TimedUNet(config, SAMPLE_LATENT, *model)
        else:
            self.calls = build_unet(name, arguments)
        unet = self.calls.unet
        shared = {id(t): t for t in [*unet.parameters(), *unet.buffers()]}
        self.unpatched = copy.deepcopy(unet, shared)  # another model of the same weights

    def check(self, one: Contestant) -> None:
        """Refuse to time what does not merge once it is compiled, in either order.

        Raises:
            SystemExit: with what is wrong.
        """
        torch._dynamo.reset()
        unet, timestep = self.calls.unet, self.calls.timesteps()[10]

        def call(module: Any) -> Tensor:
            return self.calls.call(timestep.clone(), *SMALL, module)

        plain = call(unet)
        with one.on(unet):
            merged = call(unet)
        if torch.equal(plain, merged):
            sys.exit(f"{self.name}: {one.name} did nothing.")
        # What bypasses a patch would be the guards, whichever backend runs the graph.
        compiled = torch.compile(unet, backend="eager", fullgraph=True)
        self.require_near(one, "compiled, not patched", call(compiled), plain, merged)
        with one.on(unet):
            self.require_near(one, "compiled, then patched", call(compiled), merged, plain)
        self.require_near(one, "with the patch removed", call(compiled), plain, merged)
        torch._dynamo.reset()
        with one.on(unet):
            compiled = torch.compile(unet, backend="eager", fullgraph=True)
            self.require_near(one, "patched, then compiled", call(compiled), merged, plain)

    def require_near(
        self, one: Contestant, what: str, got: Tensor, expected: Tensor, other: Tensor
    ) -> None:
        """Refuse an output that is not far nearer to one than to the other.

        Raises:
            SystemExit: it is not.
        """
        distance = float((got - expected).norm() / (other - expected).norm())
        if not distance < _NEAR:
            sys.exit(f"{self.name}: {one.name}, {what}: off by {distance:.2g} of the change.")

    def run(self, one: Contestant, seconds: float) -> dict[str, object]:
        """Compile one contestant, walk through a generation, take turns for so long; its row."""
        calls, latent = self.calls, self.calls.latent
        torch._dynamo.reset()
        with fresh_inductor_cache(), one.on(calls.unet):
            compiled = torch.compile(calls.unet, fullgraph=True)
            counters.clear()
            first = calls.timed(calls.timesteps()[0], compiled)
            graphs = counters["stats"]["unique_graphs"]
            for timestep in calls.timesteps()[:GENERATION]:
                calls.timed(timestep, compiled)
            recompilations = counters["stats"]["unique_graphs"] - graphs
            outputs = [
                calls.call(calls.timesteps()[10], latent, latent, module)
                for module in (compiled, calls.unet, self.unpatched)
            ]
            if one.name != "unpatched":
                self.require_near(one, "by inductor", *outputs)
            turns = self.take_turns(one, compiled, seconds)
        step = {name: statistics.median(taken) for name, taken in turns.items()}
        row: dict[str, object] = {
            "benchmark": "compile",
            "case": self.name,
            "contestant": one.name,
            "dtype": self.arguments.dtype,
            "batch": calls.batch,
            "refresh_every": one.refresh_every,
            "repeats": len(turns["compiled"]),
            "unpatched_ms": milliseconds(step["unpatched"]),
            "eager_speedup": f"{step['unpatched'] / step['eager']:.3f}",
            "compiled_speedup": f"{step['unpatched'] / step['compiled']:.3f}",
            "compile_s": f"{first - step['compiled']:.1f}",
            "graphs": graphs,
            "steps": GENERATION,
            "recompilations": recompilations,
        }
        for name in ("eager", "compiled"):
            row[f"{name}_ms"] = milliseconds(step[name])
            row[f"{name}_ms_20"] = milliseconds(percentile(turns[name], 0.2))
            row[f"{name}_ms_80"] = milliseconds(percentile(turns[name], 0.8))
        print(
            f"{self.name} {one.name:24} eager {row['eager_ms']} ms ({row['eager_speedup']}x), "
            f"compiled {row['compiled_ms']} ms ({row['compiled_speedup']}x), {len(turns['eager'])} "
            f"turns; compiling {row['compile_s']} s, {graphs} graphs, then {recompilations}"
        )
        return row | describe_machine(str(calls.device))

    def take_turns(self, one: Contestant, compiled: Any, seconds: float) -> dict[str, list[float]]:
        """Seconds per step of each turn, averaged over a partition's life; at least one turn."""
        modules = {"unpatched": self.unpatched, "eager": self.calls.unet, "compiled": compiled}
        for module in modules.values():
            self.calls.timed(self.calls.timesteps()[0], module)  # for warming up
        turns: dict[str, list[float]] = {name: [] for name in modules}
        started = time.perf_counter()
        while len(turns["compiled"]) < self.arguments.rounds:
            for name in list(modules)[:: 1 if len(turns["compiled"]) % 2 else -1]:
                every = 1 if name == "unpatched" else one.refresh_every
                steps = self.calls.timesteps()
                fresh = self.calls.timed(steps[10], modules[name])
                kept = self.calls.timed(steps[11], modules[name]) if every > 1 else 0.0
                turns[name].append((fresh + (every - 1) * kept) / every)
            if time.perf_counter() - started > seconds:
                break
        return turns


def parse_arguments() -> argparse.Namespace:
    """The command line, completed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=[SAMPLE, *CASES], default=SAMPLE)
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS), default=DEFAULT)
    add_model_arguments(parser)
    parser.add_argument("--minutes", type=float, default=3.0, help="of turns, for all together")
    parser.add_argument("--rounds", type=int, default=20, help="turns at most")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="a tiny model; rows are not saved")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks" / "compile.csv")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.quick:
        arguments.case, arguments.contestants = QUICK, QUICK_CONTESTANTS
        arguments.minutes = 0.1
    return arguments


def main() -> None:
    """Check and time each contestant."""
    arguments = parse_arguments()
    quiet_libraries()
    bench = Bench(arguments.case, arguments)
    contestants = [CONTESTANTS[name] for name in arguments.contestants]
    for one in contestants:
        if one.name != "unpatched":
            bench.check(one)
    print(f"{bench.name}: checks passed", file=sys.stderr)
    for one in contestants:
        row = bench.run(one, arguments.minutes * 60 / len(contestants))
        if not arguments.quick:
            append_rows(arguments.out, FIELDS, [row])


if __name__ == "__main__":
    main()
