"""What merging does to pictures, beside what users would do instead to save time.

    python scripts/bench.py quality                           48 pictures of 256 px each
    python scripts/bench.py quality --size 512                24 pictures of 512 px each
    python scripts/bench.py quality --size 512 --part time    time to generate pictures

A recipe is a way to generate a picture: merging, steps, scheduler, cache. Every recipe generates
the same pictures with the sample pipeline, from the same seeds. Each is compared with its unmerged
twin of all steps (PSNR, SSIM, distance in EfficientNet-Lite0's features), and the set with rendered
pictures; a classifier says whether it shows what it should. Pictures stay in `--work`, which
belongs to one commit; the same command resumes.

Pictures may be generated over days, beside other work, but times must be measured together: with
`--part time`, all recipes generate one batch in turns.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from math import isfinite, sqrt
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from PIL import Image
from sample_classifier import STEPS as CLASSIFIER_STEPS
from sample_classifier import load_classifier, named_correctly
from sample_pictures import PIPELINE
from sample_world import Picture, rendered, save
from torch import nn

from benchmarks.caches import count_products
from benchmarks.options import add_common_options
from benchmarks.quality_plot import plot_quality
from benchmarks.quality_recipes import UNMERGED, recipes
from benchmarks.quality_tables import quality_table, time_table
from benchmarks.rows import MACHINE, ROOT, append_rows, describe_commit, describe_machine
from sd_tokenmerge.bench.recipes import Recipe
from sd_tokenmerge.bench.turns import percentile, take_turns
from sd_tokenmerge.cli.progress import format_duration
from sd_tokenmerge.fid.evaluate import Evaluator
from sd_tokenmerge.fid.features import extract_features
from sd_tokenmerge.fid.image_change import ImageChange, paired_change
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.plan import plan_images
from sd_tokenmerge.sampling.resolve import resolve_options

COLUMNS = (
    *("size", "recipe", "merging", "steps", "scheduler", "modification", "products"),
    *("images", "identical", "psnr_db", "psnr_db_20", "psnr_db_80", "psnr_db_worst"),
    *("psnr_mean", "psnr_se", "ssim_mean", "ssim_se", "feature_distance", "feature_distance_se"),
    *("named", "named_se", "references", "fid", "fid_se", "delta", "delta_se"),
    *MACHINE,
)
IMAGE_COLUMNS = ("size", "recipe", "file", "psnr_db", "ssim", "feature_distance", "named")
TIME_COLUMNS = ("size", "recipe", "batch", "repeats", "s", "s_20", "s_80", "relative", *MACHINE)
QUICK = (UNMERGED, "dpm-10", "reuse-2", "deepcache-2", "preset-paper", "tomesd-50")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py quality`."""
    names = [recipe.name for recipe in recipes(256)]
    parser.add_argument("--part", choices=["pictures", "time"], default="pictures")
    parser.add_argument("--size", type=int, choices=[256, 512], default=256, help="in pixels")
    parser.add_argument("--recipes", nargs="+", choices=names, metavar="NAME", help="default: all")
    parser.add_argument("--model", type=Path, default=PIPELINE)
    parser.add_argument("--images-per-class", type=int, help="default: 4, or 2 at 512 px")
    parser.add_argument("--references-per-class", type=int, default=40)
    parser.add_argument("--batch-size", type=int, help="default: 12, or 1 for --part time")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "quality")
    add_common_options(parser, minutes=60)


def run(arguments: argparse.Namespace) -> str:
    """Measure pictures or times, store the rows, draw the plot, return the table."""
    chosen = QUICK if arguments.quick else arguments.recipes
    wanted = [one for one in recipes(arguments.size) if chosen is None or one.name in chosen]
    if wanted[0].name != UNMERGED:
        wanted.insert(0, Recipe(UNMERGED))
    per_class = arguments.images_per_class or (4 if arguments.size == 256 else 2)
    base = GenerateOptions(
        out="-",
        model=str(arguments.model),
        device=arguments.device,
        height=arguments.size,
        width=arguments.size,
        images_per_class=per_class,
        batch_size=arguments.batch_size or (12 if arguments.part == "pictures" else 1),
    )
    pipe = load_pipeline(base)
    measure = measure_pictures if arguments.part == "pictures" else measure_times
    table = quality_table if arguments.part == "pictures" else time_table
    if not arguments.quick:
        rows = measure(pipe, wanted, base, arguments)
        plot_quality(arguments.out)
        return table(rows)
    with tempfile.TemporaryDirectory() as folder:
        arguments.work, arguments.out, arguments.minutes = Path(folder), Path(folder), 60.0
        arguments.references_per_class, arguments.rounds = 1, 1
        base = GenerateOptions(
            out="-", model=base.model, height=64, width=64, steps=2, images_per_class=1
        )
        return table(measure(pipe, wanted, base, arguments))


def measure_pictures(
    pipe: Any, wanted: Sequence[Recipe], base: GenerateOptions, arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """Measure recipes until the time is used up; append each one's rows when it is complete."""
    work = arguments.work / str(base.height)
    claim(work, f"pictures by commit {describe_commit()}")
    if not (work / "reference").exists():
        references = rendered(arguments.references_per_class, size=base.height)
        save(references, work / "reference")
    training = CLASSIFIER_STEPS if not arguments.quick else 1
    classifier = load_classifier(arguments.work / "classifier.pt", training)
    measurer = Measurer(work, classifier, arguments.device)
    jobs = plan_images(resolve_options(base))[:1]
    rows, longest, started = [], 0.0, time.perf_counter()
    for number, recipe in enumerate(wanted):
        begun, mark = time.perf_counter(), work / f"{recipe.name}.measured"
        if begun - started + longest > arguments.minutes * 60:
            left = format_duration(longest * (len(wanted) - number))
            print(f"Time is up; at most {left} are left.", file=sys.stderr)
            break
        if mark.exists():
            continue
        recipe.generate(pipe, base, work)
        products = count_products(pipe.unet, partial(recipe.timed, pipe, base, jobs))
        row, images = measurer.measure(recipe)
        row |= {"products": products, **describe_machine(arguments.device)}
        append_rows(arguments.out / "quality.csv", COLUMNS, [row])
        append_rows(arguments.out / "quality_images.csv", IMAGE_COLUMNS, images)
        mark.touch()
        rows.append({name: str(value) for name, value in row.items()})
        spent = time.perf_counter() - begun
        longest = max(longest, spent)
        print(f"{number + 1}/{len(wanted)} {recipe.name}: {spent:.0f} s", file=sys.stderr)
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


class Measurer:
    """Measures the pictures of recipes in a working folder, which also has the reference."""

    def __init__(self, work: Path, classifier: nn.Module, device: str) -> None:
        """Extract the reference's features."""
        self._work, self._classifier = work, classifier
        self._extraction: dict[str, Any] = {
            "extractor": "efficientnet-lite0",
            "cache": str(work / "cache"),
            "device": device,
        }
        self._evaluator = Evaluator(work / "reference", kid=False, **self._extraction)

    def measure(self, recipe: Recipe) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The row of a recipe, and those of its pictures; without products and machine."""
        folder, twins = self._work / recipe.name, self._work / UNMERGED
        features = extract_features(folder, **self._extraction)
        unmerged = extract_features(twins, **self._extraction)
        files = list(features.files)
        pictures = [read_picture(folder / file) for file in files]
        named = named_correctly(self._classifier, pictures)
        row: dict[str, Any] = {
            "size": pictures[0][2].width,
            "recipe": recipe.name,
            "merging": "" if recipe.config is None else str(recipe.config),
            "steps": recipe.steps or "",
            "scheduler": recipe.scheduler or "",
            "modification": "" if recipe.modification is None else str(recipe.modification),
            "images": len(files),
            "named": mean(named),
            "named_se": standard_error([float(one) for one in named]),
        }
        is_baseline = recipe.name == UNMERGED
        found = self._evaluator.compare(features, baseline=None if is_baseline else unmerged)
        row |= {"references": found.num_reference, "fid": found.fid, "fid_se": found.fid_se}
        if found.delta is not None:
            row |= {"delta": found.delta.fid, "delta_se": found.delta.fid_se}
        images = [dict.fromkeys(IMAGE_COLUMNS, "") | {"file": file} for file in files]
        if not is_baseline:
            changes = paired_change(twins, folder, features=(unmerged, features)).images
            row |= change_numbers(changes)
            for image, change in zip(images, changes, strict=True):
                image |= {"psnr_db": change.psnr, "ssim": change.ssim}
                image |= {"feature_distance": change.feature_distance}
        for image, is_right in zip(images, named, strict=True):
            image |= {"size": row["size"], "recipe": recipe.name, "named": int(is_right)}
        return rounded(row), [rounded(image) for image in images]


def read_picture(path: Path) -> Picture:
    """A picture of a run folder, named `{class}_{i}.png`."""
    class_index, number = map(int, path.stem.split("_"))
    with Image.open(path) as image:
        return class_index, number, image.convert("RGB")


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """A row with five digits of each number that is not an integer, and "" for None."""

    def cell(value: Any) -> Any:
        return "" if value is None else f"{value:.5g}" if isinstance(value, float) else value

    return {name: cell(value) for name, value in row.items()}


def change_numbers(changes: Sequence[ImageChange]) -> dict[str, Any]:
    """Statistics of the change over pictures; PSNR over those that differ."""
    psnr = [change.psnr for change in changes if isfinite(change.psnr)]
    numbers: dict[str, Any] = {"identical": len(changes) - len(psnr)}
    if psnr:
        numbers |= {
            "psnr_db": median(psnr),
            "psnr_db_20": percentile(psnr, 0.2),
            "psnr_db_80": percentile(psnr, 0.8),
            "psnr_db_worst": min(psnr),
            "psnr_mean": mean(psnr),
            "psnr_se": standard_error(psnr),
        }
    for source, name in (("ssim", "ssim_mean"), ("feature_distance", "feature_distance")):
        values = [getattr(change, source) for change in changes]
        numbers |= {name: mean(values), f"{source}_se": standard_error(values)}
    return numbers


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else None


def measure_times(
    pipe: Any, wanted: Sequence[Recipe], base: GenerateOptions, arguments: argparse.Namespace
) -> list[dict[str, str]]:
    """Let the recipes generate one batch in turns; append and return rows of s per picture."""
    jobs = plan_images(resolve_options(base))[: base.batch_size]
    turns = {one.name: partial(one.timed, pipe, base, jobs) for one in wanted}
    reference = turns.pop(UNMERGED)
    timings = take_turns(
        (UNMERGED, reference), turns, seconds=arguments.minutes * 60, rounds=arguments.rounds
    )
    machine, rows = describe_machine(arguments.device), []
    for name, taken in timings.items():
        each = [seconds / len(jobs) for seconds in taken.seconds]
        rows.append(
            {
                "size": str(base.height),
                "recipe": name,
                "batch": str(len(jobs)),
                "repeats": str(len(each)),
                "s": f"{median(each):.3f}",
                "s_20": f"{percentile(each, 0.2):.3f}",
                "s_80": f"{percentile(each, 0.8):.3f}",
                "relative": f"{median(taken.relative):.3f}",
                **machine,
            }
        )
    append_rows(arguments.out / "quality_time.csv", TIME_COLUMNS, rows)
    return rows
