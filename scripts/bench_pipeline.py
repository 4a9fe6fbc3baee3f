"""What token merging saves of a UNet call, on the real architectures with random weights.

    python scripts/bench_pipeline.py --minutes 16     # this device's default cases
    python scripts/bench_pipeline.py --cases sd15-768 --contestants unpatched oracle-qkv-50
    python scripts/bench_pipeline.py --part self-attention   # only what merging changes: less noise
    python scripts/bench_pipeline.py --quick          # a tiny model: does it run?

Every case is one UNet at one size. Before timing, each contestant is checked on small latents: the
output is finite, removal restores the model to the last bit, and implementations that should agree
do. Then the contestants take turns, in another order in every round, until the time is used up. A
call of the unpatched UNet is timed before and after every three of them: speed-ups are over the
mean of these two, because a machine is not equally fast for minutes on end.

`oracle` merges by labels that are there before: nothing can choose clusters in less time. A setting
with `refresh_every=n` is called twice in a turn, with a new partition and with a kept one, and its
step time is that of the first plus n - 1 times the second, over n.

With `--part self-attention` the turns are those of the merged self-attentions alone, choosing and
merging included, on what they get in a call of the unpatched UNet: see `attention_calls`.

Rows are appended to a CSV file; `scripts/render_benchmarks.py` puts them into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from attention_calls import AttentionCalls
from bench_rows import MACHINE_FIELDS, append_rows, describe_machine, percentile
from pipeline_contestants import CONTESTANTS, CPU_CONTESTANTS
from timed_unet import CASES, QUICK, add_model_arguments, build_unet, milliseconds
from turns import Timings, take_turns
from unet_gate import require_sound, require_twins_agree

from sd_tokenmerge.cli.quiet import quiet_libraries

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    "benchmark",
    "case",
    "contestant",
    "dtype",
    "batch",
    "refresh_every",
    "repeats",
    "step_ms",
    "step_ms_20",
    "step_ms_80",
    "fresh_ms",
    "kept_ms",
    "speedup",
    *MACHINE_FIELDS,
)
CPU_CASES = ("sd15-512", "sd15-768")
UNET, SELF_ATTENTION = "unet", "self-attention"
OUT = {UNET: "pipeline.csv", SELF_ATTENTION: "attention.csv"}
BENCHMARKS = {UNET: "unet-step", SELF_ATTENTION: "self-attention-step"}


class Bench:
    """One case: a UNet, its inputs, and the contestants."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        """Build the UNet with random weights."""
        self.name = name
        self.arguments = arguments
        self.calls = build_unet(name, arguments)
        self.contestants = [CONTESTANTS[name] for name in arguments.contestants]

    def check(self) -> None:
        """Refuse to time what is wrong.

        Raises:
            SystemExit: with what is wrong.
        """
        require_sound(self.calls, self.contestants, self.name)
        require_twins_agree(self.calls, self.name)
        print(f"{self.name}: checks passed", file=sys.stderr)

    def run(self, seconds: float) -> list[dict[str, object]]:
        """Take turns for so long, at least one round; rows."""
        rounds = self.arguments.rounds
        if self.arguments.part == UNET:
            return self.rows(take_turns(self.calls, self.contestants, seconds, rounds))
        in_all_rounds = [replace(one, rounds=None) for one in self.contestants]
        return self.rows(take_turns(AttentionCalls(self.calls), in_all_rounds, seconds, rounds))

    def rows(self, timings: dict[str, Timings]) -> list[dict[str, object]]:
        """One row for each contestant."""
        machine = describe_machine(str(self.calls.device))
        rows = []
        for one in self.contestants:
            taken = timings[one.name]
            steps = taken.steps()
            step = statistics.median(steps)
            row: dict[str, object] = {
                "benchmark": BENCHMARKS[self.arguments.part],
                "case": self.name,
                "contestant": one.name,
                "dtype": self.arguments.dtype,
                "batch": self.calls.batch,
                "refresh_every": one.refresh_every,
                "repeats": len(steps),
                "step_ms": milliseconds(step),
                "step_ms_20": milliseconds(percentile(steps, 0.2)),
                "step_ms_80": milliseconds(percentile(steps, 0.8)),
                "fresh_ms": milliseconds(statistics.median(taken.fresh)),
                "kept_ms": milliseconds(statistics.median(taken.kept)) if taken.kept else "",
                "speedup": f"{1 / statistics.median(taken.relative()):.3f}",
                **machine,
            }
            rows.append(row)
            print(
                f"{self.name:10} {one.name:24} {row['step_ms']:>8} ms "
                f"({row['step_ms_20']} to {row['step_ms_80']}, {len(steps)}x)  "
                f"{row['speedup']}x"
            )
        return rows


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=list(CASES))
    parser.add_argument("--contestants", nargs="+", choices=list(CONTESTANTS))
    parser.add_argument("--part", choices=list(OUT), default=UNET, help="what is timed")
    add_model_arguments(parser)
    parser.add_argument("--minutes", type=float, default=16.0, help="for all cases together")
    parser.add_argument("--rounds", type=int, default=20, help="at most")
    parser.add_argument("--batch", type=int, help="default: 2, the two branches of guidance")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--quick", action="store_true", help="a tiny model; rows are not saved")
    parser.add_argument("--out", type=Path, help="default: in docs/benchmarks")
    arguments = parser.parse_args()
    arguments.out = arguments.out or ROOT / "docs" / "benchmarks" / OUT[arguments.part]
    is_cpu = arguments.device == "cpu"
    if is_cpu and arguments.threads:
        torch.set_num_threads(arguments.threads)
    arguments.cases = arguments.cases or list(CPU_CASES if is_cpu else CASES)
    arguments.contestants = arguments.contestants or list(
        CPU_CONTESTANTS if is_cpu else CONTESTANTS
    )
    return arguments


def main() -> None:
    """Check and time each case."""
    arguments = parse_arguments()
    quiet_libraries()
    if arguments.quick:
        bench = Bench(QUICK, arguments)
        bench.check()
        bench.run(arguments.minutes * 60)
        return
    work = sum(CASES[name].latent ** 2 for name in arguments.cases)
    for name in arguments.cases:
        bench = Bench(name, arguments)
        bench.check()
        share = CASES[name].latent ** 2 / work
        append_rows(arguments.out, FIELDS, bench.run(arguments.minutes * 60 * share))
        del bench
        gc.collect()
    print(f"appended to {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
