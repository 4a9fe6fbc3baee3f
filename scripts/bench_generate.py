"""What `generate` costs on top of bare pipeline calls: saving, hashing, recording, resuming.

Both make the same images with the same loaded pipeline, in turns: a busy machine slows both.

    python scripts/bench_generate.py --model MODEL --images 16 --rounds 5
"""

from __future__ import annotations

import argparse
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from sd_tokenmerge.cli.quiet import quiet_libraries
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.options import GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.plan import plan_batches, plan_images
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.run import generate


def main() -> None:
    """Measure, and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="default: the sample pipeline")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--size", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = Path(tempfile.mkdtemp(prefix="bench-generate-"))
    options = resolve_options(
        GenerateOptions(
            out=str(folder / "run"),
            model=arguments.model,
            classes=tuple(range(arguments.images)),
            images_per_class=1,
            height=arguments.size,
            width=arguments.size,
            steps=arguments.steps,
            method="none",
            batch_size=arguments.batch_size,
            device=arguments.device,
        )
    )
    pipe = load_pipeline(options)
    call_bare(pipe, options, limit=1)
    bare, full, again = [], [], []
    for _ in range(arguments.rounds):
        bare.append(seconds(lambda: call_bare(pipe, options)))
        shutil.rmtree(folder / "run", ignore_errors=True)
        full.append(seconds(lambda: generate(options, pipe=pipe)))
        again.append(seconds(lambda: generate(options, pipe=pipe)))
    shutil.rmtree(folder)
    ratios = [(one / other - 1) * 100 for one, other in zip(full, bare, strict=True)]
    count = arguments.images
    print(
        f"{options.width}x{options.height} px, {options.steps} steps, {count} images in batches "
        f"of {options.batch_size}, {options.dtype}, {device_name(options)}, torch "
        f"{torch.__version__}; medians of {arguments.rounds} alternating rounds.\n"
    )
    print("| | s/image |\n|---|---|")
    print(f"| bare `pipe(...)` calls | {statistics.median(bare) / count:.4f} |")
    print(f"| `generate` | {statistics.median(full) / count:.4f} |")
    spread = f"({min(ratios):+.1f} to {max(ratios):+.1f})"
    print(f"| overhead of a round, median (range) | {statistics.median(ratios):+.1f} % {spread} |")
    print(f"| `generate` on the finished folder | {statistics.median(again) / count:.4f} |")


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


def seconds(work: Any) -> float:
    """Wall time of one call; its images leave the device, so the device has finished."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def device_name(options: ResolvedOptions) -> str:
    """The GPU's name, or the CPU's with the threads that PyTorch uses."""
    if torch.device(options.device).type == "cuda":
        return torch.cuda.get_device_name(options.device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


if __name__ == "__main__":
    main()
