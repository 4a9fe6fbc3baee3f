"""What `generate` costs on top of bare pipeline calls, so closely that one per cent shows.

Whole runs cannot tell: on a machine that others use, two equal ones differ by ten per cent. So:

- *Pairs*. A run is made batch by batch, with a bare `pipe(...)` call of the same batch beside each
  of its batches, in the order bare, run, run, bare, bare, run, ... A slow drift of the machine then
  cancels, and what remains is the median of the paired ratios and its bootstrapped error. To the
  run counts its whole loop, with the threads that store the batch before; they rest during bare
  calls. CPU time is compared in the same way, and hardly depends on who else uses the machine.
- *Between calls*. A run that nothing interrupts: the share of its time in which no pipeline call
  was under way. Text embeddings, seeds, handing over, progress, and waiting for the last image.

A bare call encodes its prompts and the empty one each time and ends with Pillow images; a run
encodes each prompt once, and converts images in its threads. Both are part of the comparison.

    python scripts/bench_generate.py                                  the sample pipeline, 6 minutes
    python scripts/bench_generate.py --model MODEL --device cuda --cases 50x1 50x4
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median, stdev
from typing import Any, NamedTuple
from unittest import mock

import torch
from measured import Row, describe, publish, this_command

from sd_tokenmerge.cli.quiet import quiet_libraries
from sd_tokenmerge.sampling import run as run_module
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.options import GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.plan import Batch, plan_batches, plan_images
from sd_tokenmerge.sampling.progress import LoggedProgress
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.run import generate
from sd_tokenmerge.sampling.writer import ImageWriter

_LEAST_PAIRS = 5
_SHARE_OF_PAIRS = 0.8


def main() -> None:
    """Measure, and print one Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the sample pipeline")
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["25x1", "25x4", "5x1"],
        metavar="STEPSxBATCH",
        help="with few steps, the same overhead per image weighs more",
    )
    parser.add_argument("--size", type=int)
    parser.add_argument("--minutes", type=float, default=5.5)
    parser.add_argument("--device")
    parser.add_argument("--quick", action="store_true", help="a smoke test; its numbers say little")
    parser.add_argument("--store", action="store_true", help="keep the rows for docs/experiment.md")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.cases, arguments.minutes = ["2x1"], 0.0
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
    batch_s = min(cost(lambda: call_bare(pipe, options, first)).wall_s for _ in range(2))
    count = max(_LEAST_PAIRS, int(_SHARE_OF_PAIRS * limit_s / (2 * batch_s)))
    pairs = paired_costs(pipe, of_batches(options, count + 1))
    whole = of_batches(options, max(2, int((1 - _SHARE_OF_PAIRS) * limit_s / batch_s)))
    between_s, run_s, start_s = between_calls(pipe, whole)
    batch = options.batch_size
    return {
        "pixels": f"{options.width}x{options.height}",
        "steps": options.steps,
        "batch": batch,
        "bare `pipe(...)`: s/image": median(bare.wall_s for bare, _ in pairs) / batch,
        "overhead": overhead([run.wall_s / bare.wall_s for bare, run in pairs], "%"),
        "per image": overhead([(run.wall_s - bare.wall_s) / batch for bare, run in pairs], "ms"),
        "in CPU time": overhead([run.cpu_s / bare.cpu_s for bare, run in pairs], "%"),
        "pairs": len(pairs),
        "between calls": f"{100 * between_s / run_s:.2f} %",
        "once per start: s": start_s,
    }


class Cost(NamedTuple):
    """Wall and CPU seconds of the whole process."""

    wall_s: float
    cpu_s: float


class Clock:
    """Costs since it was last set."""

    def __init__(self) -> None:
        self.set()

    def set(self) -> None:
        """Start from zero."""
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> Cost:
        """What was spent since."""
        wall, cpu = self._start
        return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def cost(work: Callable[[], object]) -> Cost:
    """Of one call."""
    clock = Clock()
    work()
    return clock.read()


def overhead(values: Sequence[float], unit: str) -> str:
    """Median and standard error of ratios in per cent above one, or of seconds in milliseconds."""
    scaled = [100 * (value - 1) if unit == "%" else 1000 * value for value in values]
    draw = random.Random(0)
    medians = [median(draw.choices(scaled, k=len(scaled))) for _ in range(2000)]
    return f"{median(scaled):+.1f} ± {stdev(medians):.1f} {unit}"


def paired_costs(pipe: Any, options: ResolvedOptions) -> list[tuple[Cost, Cost]]:
    """Costs of a bare call and of a run's loop, for all batches but the first.

    During the first one, nothing is stored yet.
    """
    turns = _Turns(pipe, options)
    with mock.patch.object(run_module, "ImageWriter", turns.make_writer):
        run_once(pipe, options, turns)
    return list(zip(turns.bare, turns.run, strict=True))[1:]


class _Turns(LoggedProgress):
    """Makes bare calls between the batches of a run, as its progress."""

    def __init__(self, pipe: Any, options: ResolvedOptions):
        self.bare: list[Cost] = []
        self.run: list[Cost] = []
        self._pipe = pipe
        self._options = options
        self._batches = batches_of(options)
        self._clock = Clock()

    def make_writer(self, *arguments: Any) -> ImageWriter:
        """The run's writer."""
        self._writer = _HeldWriter(*arguments)
        return self._writer

    def start(self, total: int, done: int) -> None:
        """The run is about to make its first batch."""
        self._call_bare()
        self._clock.set()

    def update(self, done_by_process: Sequence[int]) -> None:
        """The run has made a batch and handed it to its writer."""
        self._writer.settle()
        self.run.append(self._clock.read())
        while len(self.bare) < len(self._batches) and len(self.bare) < _bare_after(len(self.run)):
            self._call_bare()
        self._clock.set()
        self._writer.release()

    def _call_bare(self) -> None:
        batch = self._batches[len(self.bare)]
        self.bare.append(cost(lambda: call_bare(self._pipe, self._options, batch)))


def _bare_after(runs: int) -> int:
    """How many bare calls come before the next batch: bare, run, run, bare, bare, run, ..."""
    return runs + 1 if runs % 2 == 0 else runs


class _HeldWriter(ImageWriter):
    """Stores nothing until it is let: bare calls have the machine for themselves."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self._held: list[tuple[Any, ...]] = []

    def submit(self, *image: Any) -> None:
        self._held.append(image)

    def release(self) -> None:
        """Store, in threads, what was submitted."""
        for image in self._held:
            super().submit(*image)
        self._held = []

    def settle(self) -> None:
        """Wait until everything that was released is stored."""
        for future in self._waiting:
            future.result()

    def close(self) -> None:
        self.release()
        super().close()


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


def run_once(pipe: Any, options: ResolvedOptions, progress: Any = None) -> Any:
    """A whole run in a new folder."""
    shutil.rmtree(options.out, ignore_errors=True)
    return generate(options, pipe=pipe, progress=progress)


def of_batches(options: ResolvedOptions, count: int) -> ResolvedOptions:
    """The same run with so many batches (or one image more), of two images per class."""
    images = count * options.batch_size
    return replace(options, classes=tuple(range(-(-images // 2))), images_per_class=2)


def batches_of(options: ResolvedOptions) -> list[Batch]:
    """The batches of a run."""
    return plan_batches(plan_images(options), options.batch_size, 0, 1)


def call_bare(pipe: Any, options: ResolvedOptions, batch: Batch) -> None:
    """The images of a batch, thrown away."""
    pipe(
        [job.prompt for job in batch],
        generator=[torch.Generator().manual_seed(job.seed) for job in batch],
        height=options.height,
        width=options.width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance_scale,
    )


if __name__ == "__main__":
    main()
