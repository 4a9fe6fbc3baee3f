"""What `generate` costs on top of bare pipeline calls, so closely that a part of a per cent shows.

Whole runs cannot tell: on a machine that others use, two equal ones differ by ten per cent. So:

- *Pairs*. A run is made batch by batch, with a bare `pipe(...)` call of the same batch beside each
  of its batches, in the order bare, run, run, bare, bare, run, ... To the run counts its whole
  loop, with the threads that store the batch before; they rest during bare calls.
- *Without the middle*. Neighbouring calls still differ by seven per cent. But once the batch before
  is stored, and until the last step, both do nothing but the same denoising steps. That middle is
  left out of both times of a pair; whether storing is over is looked up at each step. What is left
  is all that can differ, and its differences are `overhead`, in per cent of whole bare calls. The
  ratios of whole calls are given beside it. All are means of the middle half of the pairs
  (interquartile means) with bootstrapped standard errors, of wall time and of CPU time.
- *Between calls*. A run that nothing interrupts: the share of its time in which no pipeline call
  was under way. Text embeddings, seeds, handing over, progress, and waiting for the last image.

A bare call encodes its prompts and the empty one each time and ends with Pillow images; a run
encodes each prompt once, and converts images in its threads. Both are part of the comparison.

    python scripts/bench_generate.py                                  the sample pipeline, 8 minutes
    python scripts/bench_generate.py --model MODEL --device cuda --cases 50x1 50x4
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean, median, stdev
from typing import Any
from unittest import mock

from measured import Row, describe, publish, this_command
from paired_calls import Clock, Cost, batches_of, call_bare, of_batches, paired_calls, run_once

from sd_tokenmerge.cli.quiet import quiet_libraries
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.options import GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.resolve import resolve_options

_LEAST_PAIRS = 9
_SHARE_OF_PAIRS = 0.9


def main() -> None:
    """Measure, and print one Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the sample pipeline")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["25x1", "25x4"],
        metavar="STEPSxBATCH",
    )
    parser.add_argument("--size", type=int)
    parser.add_argument("--minutes", type=float, default=7.5)
    parser.add_argument("--device")
    parser.add_argument("--quick", action="store_true", help="a smoke test; its numbers say little")
    parser.add_argument("--store", action="store_true", help="keep the rows for docs/experiment.md")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cases, arguments.minutes = ["4x1"], 0.0
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-generate-") as folder:
        options = resolve_options(
            GenerateOptions(
                out=f"{folder}/run",
                model=arguments.model,
                classes=(0,),
                height=arguments.size,
                width=arguments.size,
                method="none",
                device=arguments.device,
            )
        )
        pipe = load_pipeline(options)
        for case in arguments.cases:
            steps, batch_size = map(int, case.split("x"))
            wanted = replace(options, steps=steps, batch_size=batch_size)
            rows.append(measure(pipe, wanted, 60 * arguments.minutes / len(arguments.cases)))
    publish("generate", describe(rows, this_command(), options.device), store=arguments.store)


def measure(pipe: Any, options: ResolvedOptions, limit_s: float) -> Row:
    """One row: pairs for most of the time, then a run that nothing interrupts."""
    options = of_batches(options, 2)
    run_once(pipe, options)  # the first of a process also imports
    first = batches_of(options)[0]
    clock = Clock()
    for _ in range(2):
        clock.set()
        call_bare(pipe, options, first)
        batch_s = clock.read().whole.wall_s
    count = max(_LEAST_PAIRS, int(_SHARE_OF_PAIRS * limit_s / (2 * batch_s)))
    pairs = paired_calls(pipe, of_batches(options, count + 1))
    whole = of_batches(options, max(2, int((1 - _SHARE_OF_PAIRS) * limit_s / batch_s)))
    between_s, run_s, start_s = between_calls(pipe, whole)
    batch = options.batch_size
    bare = Cost(*(median(bare.whole[kind] for bare, _ in pairs) for kind in range(2)))
    added = [
        run.without_middle(run.settled) - bare.without_middle(run.settled) for bare, run in pairs
    ]
    return {
        "pixels": f"{options.width}x{options.height}",
        "steps": options.steps,
        "batch": batch,
        "bare `pipe(...)`: s/image": bare.wall_s / batch,
        "overhead": typical([100 * more.wall_s / bare.wall_s for more in added], "%"),
        "per image": typical([1000 * more.wall_s / batch for more in added], "ms"),
        "in CPU time": typical([100 * more.cpu_s / bare.cpu_s for more in added], "%"),
        "whole calls": typical(
            [100 * (run.whole.wall_s / bare.whole.wall_s - 1) for bare, run in pairs], "%"
        ),
        "pairs": len(pairs),
        "stored after steps": max(run.settled for _, run in pairs),
        "between calls": f"{100 * between_s / run_s:.2f} %",
        "once per start: s": start_s,
    }


def typical(values: Sequence[float], unit: str) -> str:
    """Mean of the middle half, with its standard error."""
    draw = random.Random(0)
    means = [_middle_mean(draw.choices(values, k=len(values))) for _ in range(2000)]
    return f"{_middle_mean(values):+.2f} ± {stdev(means):.2f} {unit}"


def _middle_mean(values: Sequence[float]) -> float:
    quarter = len(values) // 4
    return fmean(sorted(values)[quarter : len(values) - quarter])


def between_calls(pipe: Any, options: ResolvedOptions) -> tuple[float, float, float]:
    """A run: seconds between pipeline calls, seconds of generation, seconds before it."""
    with timed_calls(type(pipe)) as calls:
        started = time.perf_counter()
        summary = run_once(pipe, options)
        total = time.perf_counter() - started
    return summary.seconds - sum(calls), summary.seconds, total - summary.seconds


@contextmanager
def timed_calls(pipeline: type) -> Iterator[list[float]]:
    """Collect the wall seconds of every call of a class's instances."""
    call: Any = pipeline.__call__
    seconds: list[float] = []

    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(self, *arguments, **options)
        finally:
            seconds.append(time.perf_counter() - start)

    with mock.patch.object(pipeline, "__call__", timed):
        yield seconds


if __name__ == "__main__":
    main()
