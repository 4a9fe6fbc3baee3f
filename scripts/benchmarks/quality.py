"""Effect of merging on pictures: change from unmerged ones, distance to rendered ones, time.

    python scripts/bench.py quality --minutes 15              resumes where it stopped
    python scripts/bench.py quality --part time               time of denoising, 10 minutes
    python scripts/bench.py quality --settings kv-sized-25 tomesd-50

Every setting generates the same pictures with the sample pipeline, from the same seeds. Each is
compared with its unmerged twin (PSNR, SSIM, distance in EfficientNet-Lite0's features), and the set
with pictures rendered from the world the pipeline was trained on. A new setting begins only if
there is time for the slowest one so far. Pictures stay in `--work`, which belongs to one commit.

Pictures may be generated over days, beside other work, but times must be measured together. So
`--part time` lets all settings denoise one batch for a few steps, in turns, without encoding
prompts and without decoding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import isfinite, sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
from sample_pictures import PIPELINE, SamplePipeline
from sample_world import CLASSES, rendered, save

from benchmarks.contestants import Contestant
from benchmarks.options import add_common_options
from benchmarks.quality_plot import plot_quality
from benchmarks.quality_settings import UNMERGED, all_settings, setting_columns
from benchmarks.quality_tables import quality_table, time_table
from benchmarks.rows import MACHINE, ROOT, append_rows, describe_commit, describe_machine
from benchmarks.turns import Cost, percentile, take_turns, timed
from sd_tokenmerge.fid.evaluate import Evaluator
from sd_tokenmerge.fid.features import FeatureSet, extract_features
from sd_tokenmerge.fid.image_change import paired_change

COLUMNS = (
    *("benchmark", "setting", "method", "merge", "sizes", "features", "keep_rate"),
    *("refresh_every", "attention_cost", "images", "identical"),
    *("psnr_db", "psnr_db_20", "psnr_db_80", "psnr_mean", "psnr_se", "ssim_mean", "ssim_se"),
    *("feature_distance", "feature_distance_se"),
    *("references", "fid", "fid_se", "delta", "delta_se", "kid", "kid_se"),
    *MACHINE,
)
IMAGE_COLUMNS = ("setting", "file", "psnr_db", "ssim", "feature_distance")
TIME_COLUMNS = (
    *("benchmark", "setting", "batch", "steps", "repeats", "ms", "ms_20", "ms_80", "relative"),
    *MACHINE,
)
STEPS = 5
"""Denoising steps in a turn of `--part time`: a multiple of every `refresh_every`."""
PROMPT = "A high quality photograph of a balloon."
QUICK = [UNMERGED, "kv-sized-10", "preset-fast", "tomesd-50"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py quality`."""
    names = [setting.name for setting in all_settings()]
    parser.add_argument("--part", choices=["pictures", "time"], default="pictures")
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--model", type=Path, default=PIPELINE)
    parser.add_argument("--images-per-class", type=int, default=4)
    parser.add_argument("--references-per-class", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality")
    add_common_options(parser, minutes=15)


def run(arguments: argparse.Namespace) -> str:
    """Measure pictures or times, store the rows, draw the plot, return the table."""
    if arguments.quick:
        arguments.settings, arguments.batch_size = QUICK, 2
    wanted = {UNMERGED, *arguments.settings}
    settings = [setting for setting in all_settings() if setting.name in wanted]
    sample = SamplePipeline(arguments.model, arguments.device)
    if arguments.part == "time":
        rows = measure_times(sample, settings, arguments)
        if not arguments.quick:
            append_rows(arguments.out / "quality_time.csv", TIME_COLUMNS, rows)
            plot_quality(arguments.out)
        return time_table(rows)
    if not arguments.quick:
        rows = measure_pictures(sample, settings, arguments)
        plot_quality(arguments.out)
        return quality_table(rows, [])
    with tempfile.TemporaryDirectory() as folder:
        arguments.work, arguments.out, arguments.minutes = Path(folder), Path(folder), 60.0
        arguments.images_per_class = arguments.references_per_class = 1
        sample.settings["num_inference_steps"] = 2
        return quality_table(measure_pictures(sample, settings, arguments), [])


def measure_pictures(
    sample: SamplePipeline, settings: Sequence[Contestant], arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """Measure settings until the time is used up; append each one's rows when it is complete."""
    work: Path = arguments.work
    per_class, model = arguments.images_per_class, arguments.model
    claim(work, f"{per_class} pictures per class by {model} at commit {describe_commit()}")
    if not (work / "reference").exists():
        save(rendered(arguments.references_per_class), work / "reference")
    pictures = Pictures(work, arguments.device)
    rows, longest, started = [], 0.0, time.perf_counter()
    for number, setting in enumerate(settings):
        begun = time.perf_counter()
        if begun - started + longest > arguments.minutes * 60:
            print(f"time is up, {len(settings) - number} settings are left", file=sys.stderr)
            break
        folder, is_measured = work / setting.name, work / f"{setting.name}.measured"
        if not folder.exists():
            torch.manual_seed(0)  # the tomesd package draws from the global generator
            with setting.on(sample.pipe.unet):
                made = sample.generate(per_class, arguments.batch_size, CLASSES)
            save(made, folder)
        if is_measured.exists():
            continue
        row, images = pictures.measure(setting)
        rows.append(row | describe_machine(arguments.device))
        append_rows(arguments.out / "quality.csv", COLUMNS, rows[-1:])
        append_rows(arguments.out / "quality_images.csv", IMAGE_COLUMNS, images)
        is_measured.touch()
        longest = max(longest, time.perf_counter() - begun)
        print(f"{number + 1}/{len(settings)} {setting.name}", file=sys.stderr)
    return rows


def claim(work: Path, content: str) -> None:
    """Reserve a working folder for one kind of pictures.

    Raises:
        SystemExit: it holds pictures of another kind.
    """
    mark = work / "content.txt"
    work.mkdir(parents=True, exist_ok=True)
    if not mark.exists():
        mark.write_text(content, encoding="utf-8")
    elif (present := mark.read_text(encoding="utf-8")) != content:
        sys.exit(f"{work} has {present}, not {content}: name another --work.")


class Pictures:
    """The pictures of all settings in a working folder, and the reference they share."""

    def __init__(self, work: Path, device: str) -> None:
        """Extract the reference's features."""
        self.work = work
        self._extraction: dict[str, Any] = {
            "extractor": "efficientnet-lite0",
            "cache": str(work / "cache"),
            "device": device,
        }
        self._evaluator = Evaluator(work / "reference", **self._extraction)

    def features(self, name: str) -> FeatureSet:
        """EfficientNet-Lite0's features of a setting's pictures."""
        return extract_features(self.work / name, **self._extraction)

    def measure(self, setting: Contestant) -> tuple[dict[str, str], list[dict[str, str]]]:
        """The row of a setting, and those of its pictures."""
        features, twins = self.features(setting.name), self.features(UNMERGED)
        is_baseline = setting.name == UNMERGED
        result = self._evaluator.compare(features, baseline=None if is_baseline else twins)
        numbers: dict[str, float | None] = {
            "fid": result.fid,
            "fid_se": result.fid_se,
            "kid": result.kid,
            "kid_se": result.kid_se,
        }
        if result.delta is not None:
            numbers |= {"delta": result.delta.fid, "delta_se": result.delta.fid_se}
        images = []
        if not is_baseline:
            folders = (self.work / UNMERGED, self.work / setting.name)
            changes = paired_change(*folders, features=(twins, features)).images
            images = [asdict(change) for change in changes]
            numbers |= change_numbers(images)
        row = {
            "benchmark": "quality",
            **setting_columns(setting),
            "images": str(features.num_images),
            "references": str(result.num_reference),
            **{name: _digits(value) for name, value in numbers.items()},
        }
        names = ("psnr", "ssim", "feature_distance")
        return row, [
            {"setting": setting.name, "file": image["file"]}
            | {name.replace("psnr", "psnr_db"): _digits(image[name]) for name in names}
            for image in images
        ]


def _digits(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def change_numbers(images: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Statistics of the change over pictures; PSNR over those that differ."""
    psnr = [image["psnr"] for image in images if isfinite(image["psnr"])]
    numbers: dict[str, float | None] = {"identical": len(images) - len(psnr)}
    if psnr:
        numbers |= {
            "psnr_db": median(psnr),
            "psnr_db_20": percentile(psnr, 0.2),
            "psnr_db_80": percentile(psnr, 0.8),
            "psnr_mean": mean(psnr),
            "psnr_se": standard_error(psnr),
        }
    for source, name in (("ssim", "ssim_mean"), ("feature_distance", "feature_distance")):
        values = [image[source] for image in images]
        numbers |= {name: mean(values), f"{source}_se": standard_error(values)}
    return numbers


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def measure_times(
    sample: SamplePipeline, settings: Sequence[Contestant], arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """Let the settings denoise one batch in turns; rows of milliseconds per picture and step."""
    pipe, batch = sample.pipe, arguments.batch_size
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt(PROMPT, pipe.device, batch, True)
    keywords = {
        **sample.settings,
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "num_inference_steps": STEPS,
        "output_type": "latent",
    }

    def denoise(setting: Contestant) -> Callable[[], Cost]:
        def turn() -> Cost:
            with setting.on(pipe.unet):
                return timed(lambda: pipe(generator=torch.Generator().manual_seed(0), **keywords))

        return turn

    unmerged, *others = settings
    timings = take_turns(
        (UNMERGED, denoise(unmerged)),
        {setting.name: denoise(setting) for setting in others},
        seconds=arguments.minutes * 60,
        rounds=arguments.rounds,
    )
    machine = describe_machine(arguments.device)
    rows = []
    for name, taken in timings.items():
        each = [1000 * seconds / (batch * STEPS) for seconds in taken.seconds]
        rows.append(
            {
                "benchmark": "quality-time",
                "setting": name,
                "batch": str(batch),
                "steps": str(STEPS),
                "repeats": str(len(each)),
                "ms": f"{median(each):.2f}",
                "ms_20": f"{percentile(each, 0.2):.2f}",
                "ms_80": f"{percentile(each, 0.8):.2f}",
                "relative": f"{median(taken.relative):.3f}",
                **machine,
            }
        )
    return rows
