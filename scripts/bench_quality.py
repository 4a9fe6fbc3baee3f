"""What token merging does to pictures: change to the unmerged ones, and distance to real ones.

    python scripts/bench_quality.py --minutes 15      # goes on where it was when started again
    python scripts/bench_quality.py --list            # settings, most important first
    python scripts/bench_quality.py --quick           # four pictures each: does it run?

Every setting generates the same pictures with the sample pipeline, from the same seeds. Each is
compared with its unmerged twin (PSNR, SSIM, distance in EfficientNet-Lite0's features), and the set
with pictures rendered from the world that the pipeline was trained on. A new setting is begun only
if the last one's time is left. Complete settings are written, all anew, to two CSV files: one row
per setting, and one per picture for paired comparisons, and drawn as a plot against the times that
`bench_quality_time.py` measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from bench_rows import MACHINE_FIELDS, describe_machine, percentile, read_rows
from plot_quality import plot_quality
from quality_settings import UNMERGED, Setting, all_settings

from sd_tokenmerge.cli.quiet import quiet_libraries
from sd_tokenmerge.fid.evaluate import Evaluator
from sd_tokenmerge.fid.features import FeatureSet, extract_features
from sd_tokenmerge.fid.image_change import paired_change
from sd_tokenmerge.files import write_atomically
from sd_tokenmerge.sampling.description import (
    content_differences,
    describe_run,
    option_differences,
    read_description,
)
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.manifest import read_manifest
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.plan import plan_images
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.run import generate

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    *("benchmark", "setting", "method", "merge", "sizes", "features", "keep_rate"),
    *("refresh_every", "attention_cost", "images", "identical"),
    *("psnr_db", "psnr_db_20", "psnr_db_80", "psnr_mean", "psnr_se", "ssim_mean", "ssim_se"),
    *("feature_distance", "feature_distance_se"),
    *("references", "fid", "fid_se", "delta", "delta_se", "kid", "kid_se"),
    *MACHINE_FIELDS,
)
IMAGE_FIELDS = ("setting", "file", "psnr_db", "ssim", "feature_distance")


class Bench:
    """The pipeline, the reference, and what was measured."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Render the reference where it is missing."""
        self.arguments = arguments
        self.work: Path = arguments.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.reference = self.work / "reference"
        render = [sys.executable, str(Path(__file__).with_name("render_sample_world.py"))]
        count = str(arguments.references_per_class)
        subprocess.run(
            [*render, "--out", str(self.reference), "--images-per-class", count], check=True
        )
        self.pipe: Any = None
        self.evaluator: Evaluator | None = None

    def measure(self, setting: Setting) -> dict[str, Any]:
        """Generate what is missing of a setting and measure it, unless it was before."""
        folder = self.work / "runs" / setting.name
        options = setting.generation(self.arguments, folder)
        if self.pipe is None:
            self.pipe = load_pipeline(options)
        with setting.on(self.pipe):
            generate(options, pipe=self.pipe, overwrite=is_outdated(options))
        twins = self.work / "runs" / UNMERGED
        content = [[r.sha256 for r in read_manifest(f)] for f in (folder, twins)]
        path = self.work / "measured" / f"{setting.name}.json"
        if path.exists():
            known: dict[str, Any] = json.loads(path.read_text())
            if known["content"] == content:
                return known
        measured = self.compare(setting, folder, twins) | {"content": content}
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(measured).encode())
        return measured

    def features(self, folder: Path) -> FeatureSet:
        """EfficientNet-Lite0's features of a folder."""
        return extract_features(folder, **self.extraction())

    def extraction(self) -> dict[str, Any]:
        """Options of the feature extraction."""
        return {
            "extractor": "efficientnet-lite0",
            "cache": str(self.work / "cache"),
            "device": self.arguments.device,
        }

    def compare(self, setting: Setting, folder: Path, twins: Path) -> dict[str, Any]:
        """The numbers of a setting: its row, and those of its pictures."""
        if self.evaluator is None:
            self.evaluator = Evaluator(self.reference, **self.extraction())
        features, baseline = self.features(folder), self.features(twins)
        is_baseline = setting.name == UNMERGED
        distance = self.evaluator.compare(features, baseline=None if is_baseline else baseline)
        row: dict[str, Any] = {
            "benchmark": "quality",
            "setting": setting.name,
            "method": "tomesd" if setting.tomesd else setting.method,
            "merge": "" if is_baseline else setting.merge,
            "sizes": setting.proportional_attention,
            "features": "" if is_baseline else setting.features,
            "keep_rate": setting.keep_rate,
            "refresh_every": setting.refresh_every,
            "attention_cost": f"{setting.attention_cost:.4g}",
            "images": features.num_images,
            "references": distance.num_reference,
            "fid": distance.fid,
            "fid_se": distance.fid_se,
            "kid": distance.kid,
            "kid_se": distance.kid_se,
            **describe_machine(str(torch.device(self.arguments.device))),
        }
        if distance.delta is not None:
            row |= {"delta": distance.delta.fid, "delta_se": distance.delta.fid_se}
        images = []
        if not is_baseline:
            changes = paired_change(twins, folder, features=(baseline, features)).images
            images = [asdict(change) for change in changes]
            row |= change_numbers(images)
        return {"row": row, "images": images}


def is_outdated(options: GenerateOptions) -> bool:
    """Whether the run folder was begun with another model or other options."""
    folder = Path(options.out)
    description = read_description(folder) if folder.exists() else None
    if description is None:
        return False
    resolved = resolve_options(options)
    now = describe_run(resolved, plan_images(resolved))
    return bool(option_differences(description, resolved) or content_differences(description, now))


def change_numbers(images: list[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of the change over pictures; PSNR over those that differ at all."""
    psnr = [image["psnr"] for image in images if isfinite(image["psnr"])]
    numbers: dict[str, Any] = {"identical": len(images) - len(psnr)}
    if psnr:
        numbers |= {
            "psnr_db": statistics.median(psnr),
            "psnr_db_20": percentile(psnr, 0.2),
            "psnr_db_80": percentile(psnr, 0.8),
            "psnr_mean": statistics.mean(psnr),
            "psnr_se": standard_error(psnr),
        }
    for name, source in (("ssim_mean", "ssim"), ("feature_distance", "feature_distance")):
        values = [image[source] for image in images]
        numbers[name] = statistics.mean(values)
        numbers[name.removesuffix("_mean") + "_se"] = standard_error(values)
    return numbers


def standard_error(values: list[float]) -> float | None:
    """Of the mean over pictures; None for a single one."""
    return statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def write_rows(path: Path, fields: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Replace a CSV file, numbers to five digits."""
    import csv

    def text(value: Any) -> Any:
        return "" if value is None else f"{value:.5g}" if isinstance(value, float) else value

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: text(row.get(name)) for name in fields} for row in rows)


def write_results(out: Path, measured: list[dict[str, Any]]) -> None:
    """Both CSV files and the plot."""
    write_rows(out / "quality.csv", FIELDS, [one["row"] for one in measured])
    images = [
        {**image, "setting": one["row"]["setting"], "psnr_db": image["psnr"]}
        for one in measured
        for image in one["images"]
    ]
    write_rows(out / "quality_images.csv", IMAGE_FIELDS, images)
    plot_quality(read_rows(out / "quality.csv"), out / "quality.png")


def parse_arguments() -> argparse.Namespace:
    """The command line, completed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "samples" / "pipeline")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--settings", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--images-per-class", type=int, default=4)
    parser.add_argument("--references-per-class", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks")
    parser.add_argument("--list", action="store_true", help="print the settings' names")
    parser.add_argument("--quick", action="store_true", help="four settings, nothing is kept")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.images_per_class, arguments.references_per_class = 2, 2
        arguments.settings = [UNMERGED, "kv-sized-10", "preset-fast", "tomesd-50"]
    known = {setting.name: setting for setting in all_settings()}
    unknown = set(arguments.settings or ()) - set(known)
    if unknown:
        parser.error(f"--settings: unknown {', '.join(sorted(unknown))}; see --list.")
    wanted = set(arguments.settings or known) | {UNMERGED}
    arguments.settings = [setting for name, setting in known.items() if name in wanted]
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Measure settings until the time is used up."""
    started = time.perf_counter()
    bench = Bench(arguments)
    measured: list[dict[str, Any]] = []
    longest = 0.0
    for number, setting in enumerate(arguments.settings, 1):
        begun = time.perf_counter()
        if begun - started + longest > arguments.minutes * 60:
            left = len(arguments.settings) - number + 1
            print(f"time is up: {left} settings are left, run again", file=sys.stderr)
            break
        measured.append(bench.measure(setting))
        seconds = time.perf_counter() - begun
        if number > 1:  # the first one loads the model and the reference
            longest = max(longest, seconds)
        row = measured[-1]["row"]
        change = f"{row['psnr_db']:.1f} dB" if "psnr_db" in row else ""
        print(
            f"{number}/{len(arguments.settings)} {setting.name:24} {change:8} ({seconds:.0f} s)",
            file=sys.stderr,
        )
    write_results(arguments.out, measured)
    print(f"written to {arguments.out}", file=sys.stderr)


def main() -> None:
    """Measure, or list the settings."""
    arguments = parse_arguments()
    quiet_libraries()
    if arguments.list:
        print("\n".join(setting.name for setting in all_settings()))
    elif arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            arguments.work, arguments.out = Path(folder) / "work", Path(folder) / "out"
            run(arguments)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
