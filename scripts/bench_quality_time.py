"""How long each setting of `bench_quality.py` takes: time of denoising, in turns.

    python scripts/bench_quality_time.py              # about ten minutes; let nothing else run
    python scripts/bench_quality_time.py --settings unmerged kv-sized-25 tomesd-50
    python scripts/bench_quality_time.py --quick      # two steps, nothing is kept

Pictures may be made over days, beside other work; times may not. So every setting denoises one
batch for a few steps, all settings after one another, in another order in every round. The prompts
are encoded before, and nothing is decoded. Rows are appended to a CSV file, the plot of
`bench_quality.py` is drawn anew, and `scripts/render_benchmarks.py` shows the times beside what the
settings do to pictures.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_rows import MACHINE_FIELDS, append_rows, describe_machine, percentile, read_rows
from plot_quality import plot_quality
from quality_settings import UNMERGED, Setting, all_settings

from sd_tokenmerge import apply_patch, remove_patch
from sd_tokenmerge.cli.quiet import quiet_libraries
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.resolve import resolve_options

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    *("benchmark", "setting", "batch", "steps", "repeats"),
    *("ms", "ms_20", "ms_80", "relative"),
    *MACHINE_FIELDS,
)
PROMPT = "A high quality photograph of a balloon."


class Denoiser:
    """One batch of the pipeline, to be denoised again and again."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Load the pipeline and encode the prompt."""
        options = Setting(UNMERGED).generation(arguments, arguments.out / "never-written")
        self.options = resolve_options(options)
        self.pipe: Any = load_pipeline(self.options)
        self.steps: int = arguments.steps
        self.batch: int = arguments.batch_size
        device = torch.device(arguments.device)
        with torch.no_grad():
            self.prompt, self.negative = self.pipe.encode_prompt(PROMPT, device, self.batch, True)

    def seconds(self, setting: Setting) -> float:
        """Wall time of denoising under a setting, without what comes before and after."""
        generator = torch.Generator().manual_seed(0)
        with setting.on(self.pipe):
            if setting.method != "none" and not setting.tomesd:
                apply_patch(self.pipe, **setting.patch())
            synchronize()
            start = time.perf_counter()
            self.pipe(
                prompt_embeds=self.prompt,
                negative_prompt_embeds=self.negative,
                num_inference_steps=self.steps,
                guidance_scale=self.options.guidance_scale,
                height=self.options.height,
                width=self.options.width,
                generator=generator,
                output_type="latent",
            )
            synchronize()
            taken = time.perf_counter() - start
            if setting.method != "none" and not setting.tomesd:
                remove_patch(self.pipe)
        return taken


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Take turns for so many rounds, or until the time is used up; rows."""
    denoiser = Denoiser(arguments)
    settings: list[Setting] = arguments.settings
    taken: dict[str, list[float]] = {setting.name: [] for setting in settings}
    denoiser.seconds(settings[0])
    started = time.perf_counter()
    for number in range(arguments.rounds):
        begun = time.perf_counter()
        start = number * 7 % len(settings)
        order = settings[start:] + settings[:start]
        for setting in order if number % 2 == 0 else order[::-1]:
            taken[setting.name].append(denoiser.seconds(setting))
        now = time.perf_counter()
        print(f"round {number + 1} took {now - begun:.0f} s", file=sys.stderr)
        if now - started + 0.9 * (now - begun) > arguments.minutes * 60:
            break
    machine = describe_machine(str(torch.device(arguments.device)))
    unmerged = statistics.median(taken[UNMERGED])
    return [
        row(name, values, denoiser.batch, denoiser.steps, unmerged) | machine
        for name, values in taken.items()
    ]


def row(
    name: str, seconds: list[float], batch: int, steps: int, unmerged: float
) -> dict[str, object]:
    """Milliseconds per picture and step, and the time relative to that of unmerged pictures.

    Only the latter compares with other runs: a machine is not always equally fast.
    """
    each = [1000 * value / (batch * steps) for value in seconds]
    return {
        "benchmark": "quality-time",
        "setting": name,
        "batch": batch,
        "steps": steps,
        "repeats": len(each),
        "ms": f"{statistics.median(each):.2f}",
        "ms_20": f"{percentile(each, 0.2):.2f}",
        "ms_80": f"{percentile(each, 0.8):.2f}",
        "relative": f"{statistics.median(seconds) / unmerged:.3f}",
    }


def parse_arguments() -> argparse.Namespace:
    """The command line, completed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "samples" / "pipeline")
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--steps", type=int, default=5, help="a multiple of every `refresh_every`")
    parser.add_argument("--rounds", type=int, default=5, help="at most")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all rounds together")
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--quick", action="store_true", help="three settings, nothing is kept")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.batch_size = 1, 2
        arguments.settings = [UNMERGED, "preset-fast", "tomesd-50"]
    arguments.images_per_class = 1
    known = {setting.name: setting for setting in all_settings()}
    unknown = set(arguments.settings or ()) - set(known)
    if unknown:
        parser.error(f"--settings: unknown {', '.join(sorted(unknown))}.")
    wanted = {UNMERGED} | set(arguments.settings or known)
    arguments.settings = [setting for name, setting in known.items() if name in wanted]
    uneven = [one.name for one in arguments.settings if arguments.steps % one.refresh_every]
    if uneven:
        parser.error(f"--steps must be a multiple of `refresh_every` of {', '.join(uneven)}.")
    return arguments


def main() -> None:
    """Measure, save, draw."""
    arguments = parse_arguments()
    quiet_libraries()
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            arguments.out = Path(folder)
            append_rows(arguments.out / "quality_time.csv", FIELDS, measure(arguments))
            print((arguments.out / "quality_time.csv").read_text(), end="")
        return
    append_rows(arguments.out / "quality_time.csv", FIELDS, measure(arguments))
    plot_quality(read_rows(arguments.out / "quality.csv"), arguments.out / "quality.png")


if __name__ == "__main__":
    main()
