"""What `generate` costs on top of bare pipeline calls: saving, hashing, recording, resuming.

Both make the same images with the same loaded pipeline, in turns: a busy machine slows both.

    python scripts/bench_generate.py                                  the sample pipeline, 3 minutes
    python scripts/bench_generate.py --model MODEL --device cuda --images 16
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measured import Row, describe, publish, this_command

from sd_tokenmerge.cli.quiet import quiet_libraries
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.options import GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.plan import plan_batches, plan_images
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.run import generate


def main() -> None:
    """Measure, and print one Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: the sample pipeline")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--minutes", type=float, default=3.5, help="stop beginning rounds after so long"
    )
    parser.add_argument("--device")
    parser.add_argument("--quick", action="store_true", help="a smoke test; its numbers say little")
    parser.add_argument("--store", action="store_true", help="keep the rows for docs/experiment.md")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images, arguments.rounds, arguments.steps = 2, 1, 2
    quiet_libraries()
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-generate-") as folder:
        options = resolve_options(
            GenerateOptions(
                out=folder,
                model=arguments.model,
                classes=tuple(range(arguments.images)),
                images_per_class=1,
                height=arguments.size,
                width=arguments.size,
                steps=arguments.steps,
                method="none",
                device=arguments.device,
            )
        )
        pipe = load_pipeline(options)
        for batch_size in arguments.batch_sizes:
            wanted = replace(
                options, out=str(Path(folder) / str(batch_size)), batch_size=batch_size
            )
            seconds = 60 * arguments.minutes / len(arguments.batch_sizes)
            rows.append(measure(pipe, wanted, arguments.rounds, seconds))
    document = describe(rows, this_command(), options.device)
    publish("generate", document, store=arguments.store)


def measure(pipe: Any, options: ResolvedOptions, rounds: int, limit_s: float) -> Row:
    """Bare calls, a run, and the run again on its finished folder, in turns."""
    call_bare(pipe, options, limit=1)
    started = time.perf_counter()
    generate(options, pipe=pipe)  # the first one of a process also imports
    bare, full, again = [], [], []
    while len(bare) < rounds and (not bare or time.perf_counter() - started < limit_s):
        bare.append(seconds(lambda: call_bare(pipe, options)))
        shutil.rmtree(options.out, ignore_errors=True)
        full.append(seconds(lambda: generate(options, pipe=pipe)))
        again.append(seconds(lambda: generate(options, pipe=pipe)))
    overheads = [(one / other - 1) * 100 for one, other in zip(full, bare, strict=True)]
    count = len(plan_images(options))
    return {
        "pixels": f"{options.width}x{options.height}",
        "steps": options.steps,
        "batch": options.batch_size,
        "images": count,
        "bare `pipe(...)`: s/image": median(bare) / count,
        "`generate`: s/image": median(full) / count,
        "overhead, median": f"{median(overheads):+.1f} %",
        "range": f"{min(overheads):+.1f} to {max(overheads):+.1f} %",
        "rounds": len(bare),
        "finished folder: s/image": median(again) / count,
    }


def call_bare(pipe: Any, options: ResolvedOptions, limit: int | None = None) -> None:
    """The same images, thrown away."""
    for batch in plan_batches(plan_images(options), options.batch_size, 0, 1)[:limit]:
        pipe(
            [job.prompt for job in batch],
            generator=[torch.Generator().manual_seed(job.seed) for job in batch],
            height=options.height,
            width=options.width,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
        )


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call; its images leave the device, so the device has finished."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
