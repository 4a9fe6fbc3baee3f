"""Measure on this machine whether merging pays for a model, resuming where a start ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from statistics import mean, median
from typing import Any

from sd_tokenmerge.bench.contestants import UNPATCHED, Step, Tomesd, preset_contestants
from sd_tokenmerge.bench.gate import require_sound
from sd_tokenmerge.bench.page import bench_page
from sd_tokenmerge.bench.pipeline_calls import PipelineCalls
from sd_tokenmerge.bench.plot import Point, plot_against_time
from sd_tokenmerge.bench.recipes import Recipe
from sd_tokenmerge.bench.turns import Cost, rotated, take_turns
from sd_tokenmerge.bench.verdict import verdict
from sd_tokenmerge.config import PRESETS
from sd_tokenmerge.fid.image_change import paired_change
from sd_tokenmerge.files import read_json, write_atomically
from sd_tokenmerge.report.contact_sheet import PictureGrid, contact_sheet
from sd_tokenmerge.report.page import Picture, page_html
from sd_tokenmerge.sampling.description import DescriptionError, surroundings
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.manifest import (
    intact_records,
    load_manifest,
    manifest_files,
    read_manifest,
)
from sd_tokenmerge.sampling.options import GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.pipelines import has_unet
from sd_tokenmerge.sampling.plan import plan_images
from sd_tokenmerge.sampling.resolve import resolve_options

RECORD, PLOT, SHEET, PAGE = "bench.json", "plot.png", "contact_sheet.jpg", "index.html"
PICTURES = "pictures"
FULL = "full"
ROUNDS = 5
ENOUGH_S = 60.0
"""No round of the denoiser's calls begins after this many seconds of them."""
FEWER = (0.9, 0.8, 0.65, 0.5)
"""Fractions of the steps that recipes with fewer steps take."""

Report = Callable[[str, float], None]
"""Receives what was done last, and the fraction of all work that is done."""


def run_bench(
    options: GenerateOptions, *, quick: bool = False, report: Report | None = None
) -> dict[str, Any]:
    """Time the denoiser's calls in turns, then generate pictures by every recipe, and compare.

    May be interrupted at any moment and started again. Before anything is timed, patches are
    checked on small inputs.

    Args:
        options: the model, size, steps and classes or prompts (default: two of the model's
            classes); `options.out` is the folder for pictures, `RECORD`, `PLOT`, `SHEET` and
            `PAGE`.
        quick: one round of calls and one picture for each recipe.
        report: receives the progress.

    Returns:
        The content of `RECORD`: `"conditions"`; `"calls"` and `"pictures"` by name, with times
        relative to the unpatched denoiser and the full recipe; `"verdict"`, two sentences.

    Raises:
        UnsoundError: a patch does not merge as it should.
        ValueError, OSError, RunStopped: as in `sampling.run.generate`; also if the folder holds
            measurements under other conditions.
    """
    base = choose_pictures(options, quick)
    folder = Path(options.out)
    record = Record(folder, describe_conditions(base, quick))
    work = Work(record, base, quick, report or (lambda what, share: None))
    if not work.is_done:
        pipe = load_pipeline(base)
        folder.mkdir(parents=True, exist_ok=True)
        work.time_calls(pipe)
        work.generate(pipe)
    record.content |= summarize(record.content["rounds"], work.recipes, folder / PICTURES)
    record.save()
    write_pictures(folder, base, record.content["pictures"])
    pictures = [
        Picture.read("Closeness against time", folder / PLOT, is_plot=True),
        Picture.read("Same seed, and time relative to all steps unmerged", folder / SHEET),
    ]
    write_atomically(folder / PAGE, page_html(bench_page(record.content, pictures)))
    return record.content


def choose_pictures(options: GenerateOptions, quick: bool) -> ResolvedOptions:
    """Options with everything filled in: one picture for each class or prompt, by default two."""
    resolved = resolve_options(replace(options, merging=None, images_per_class=1, batch_size=1))
    if options.classes is None and options.prompts is None:
        known = resolved.classes or ()
        resolved = replace(resolved, classes=tuple(sorted({known[0], known[len(known) // 2]})))
    if quick and resolved.classes is not None:
        resolved = replace(resolved, classes=resolved.classes[:1])
    return resolved


def describe_conditions(base: ResolvedOptions, quick: bool) -> dict[str, Any]:
    """What must stay the same when measurements are continued."""
    here = surroundings(base.device)
    return {
        "model": base.model,
        "size": f"{base.width}x{base.height}",
        "steps": base.steps,
        "guidance_scale": base.guidance_scale,
        "scheduler": base.scheduler or "the model's own",
        "seed": base.seed,
        "dtype": base.dtype,
        "attention": base.attention_backend,
        "prompts": [job.prompt for job in plan_images(base)],
        "quick": quick,
        "device": here["device"]["name"],
        "versions": here["versions"],
        "commit": here["commit"],
    }


def make_recipes(steps: int, *, quick: bool, with_tomesd: bool) -> list[Recipe]:
    """The full recipe, fewer steps, the presets, and perhaps the tomesd package."""
    counts = dict.fromkeys(
        max(1, round(share * steps)) for share in (FEWER[1::2] if quick else FEWER)
    )
    recipes = [
        Recipe(FULL),
        *(Recipe(f"steps-{count}", steps=count) for count in counts if count < steps),
        *(Recipe(f"preset-{name}", config) for name, config in PRESETS.items()),
    ]
    if with_tomesd:
        recipes.append(Recipe("tomesd-50", modification=Tomesd(0.5)))
    return recipes


class Record:
    """`RECORD` in a folder.

    Attributes:
        content: as it will be saved.
    """

    def __init__(self, folder: Path, conditions: dict[str, Any]) -> None:
        """Read the record, or begin a new one.

        Raises:
            ValueError: the file is damaged, or was written under other conditions.
        """
        self._path = folder / RECORD
        self.content: dict[str, Any] = {"conditions": conditions, "rounds": []}
        if not self._path.exists():
            return
        found = read_json(self._path)
        parts = (found.get("conditions"), found.get("rounds")) if isinstance(found, dict) else ()
        if [type(part) for part in parts] != [dict, list]:
            raise ValueError(f"{self._path} is damaged: remove it, or use another `out`.")
        for name, value in conditions.items():
            if (before := found["conditions"].get(name)) != value:
                raise ValueError(
                    f"`out` must hold measurements under the same conditions, got {str(folder)!r} "
                    f"with another {name}: {before}, now {value}. Use another `out`."
                )
        self.content = found

    def save(self) -> None:
        """Write the file."""
        write_atomically(self._path, (json.dumps(self.content, indent=2) + "\n").encode())


@dataclass
class Work:
    """The measurements of a run, and their progress.

    Attributes:
        record: receives the rounds.
        base: options of all recipes.
        quick: whether to measure as little as possible.
        report: receives the progress.
    """

    record: Record
    base: ResolvedOptions
    quick: bool
    report: Report

    def __post_init__(self) -> None:
        """Plan what is left to do, in calls of the denoiser."""
        is_unet = has_unet(self.base)
        self.recipes = make_recipes(
            self.base.steps,
            quick=self.quick,
            with_tomesd=is_unet and find_spec("tomesd") is not None,
        )
        self.contestants = [
            one for one in preset_contestants() if is_unet or one.modification is None
        ]
        self._folder = Path(self.base.out) / PICTURES
        self._jobs = plan_images(self.base)
        turn = sum(min(one.refresh_every, 2) for one in self.contestants)
        rounds = (1 if self.quick else ROUNDS) - len(self.record.content["rounds"])
        self._calls = 0 if self._is_timed else turn * rounds
        missing = sum(
            recipe.steps or self.base.steps
            for recipe in self.recipes
            for _ in {job.file for job in self._jobs} - _intact(self._folder / recipe.name)
        )
        self._total = self._calls + missing
        self._done = 0.0

    @property
    def is_done(self) -> bool:
        """Whether everything was measured, and every picture is intact."""
        return self._total == 0

    @property
    def _is_timed(self) -> bool:
        rounds: list[dict[str, dict[str, float]]] = self.record.content["rounds"]
        spent = sum(turn["seconds"] for one in rounds for turn in one.values())
        return len(rounds) >= (1 if self.quick else ROUNDS) or spent > ENOUGH_S

    def _advance(self, what: str, calls: float) -> None:
        self._done += calls
        self.report(what, self._done / self._total)

    def time_calls(self, pipe: Any) -> None:
        """Time the denoiser under every contestant in turns; stores each round."""
        if not self._is_timed:
            calls = PipelineCalls(pipe, self.base, self._jobs[0])
            require_sound(calls, self.contestants)
            steps = {one.name: Step(calls, one) for one in self.contestants}
            self.report("checks passed", 0.0)
            while not self._is_timed:
                self._time_round(steps)
        self._done = self._calls

    def _time_round(self, steps: dict[str, Step]) -> None:
        def turn(name: str) -> Callable[[], Cost]:
            def run() -> Cost:
                cost = steps[name]()
                self._advance(f"calls, {name}", min(steps[name].contestant.refresh_every, 2))
                return cost

            return run

        rounds: list[dict[str, dict[str, float]]] = self.record.content["rounds"]
        others = rotated([name for name in steps if name != UNPATCHED], len(rounds))
        timings = take_turns(
            (UNPATCHED, steps[UNPATCHED]),
            {name: turn(name) for name in others},
            seconds=0,
            rounds=1,
        )
        rounds.append(
            {
                name: {"seconds": median(taken.seconds), "relative": median(taken.relative)}
                for name, taken in timings.items()
            }
        )
        self.record.save()

    def generate(self, pipe: Any) -> None:
        """Generate one picture by every recipe, then the next; intact ones are kept."""
        shorter = replace(self.base, steps=2)
        self.recipes[0].timed(pipe, shorter, self._jobs[:1])  # a warm-up
        count = len(self._jobs)
        for number in range(1, count + 1):
            part = replace(self.base, shard=f"{number}/{count}")
            for recipe in self.recipes:
                try:
                    generated = recipe.generate(pipe, part, self._folder).generated
                except DescriptionError as error:
                    folder = self._folder / recipe.name
                    raise ValueError(
                        f"{error.problem}. Remove the folder {folder}, or use another `out`."
                    ) from error
                if generated:
                    steps = recipe.steps or self.base.steps
                    self._advance(f"picture {number} of {count}, {recipe.name}", steps)


def _intact(folder: Path) -> set[str]:
    """Names of a run's intact pictures; none if its manifest has to be repaired."""
    content = load_manifest(manifest_files(folder))
    if content.damaged_lines:
        return set()
    return set(intact_records(folder, content.records, hash_all=False))


def summarize(
    rounds: Sequence[dict[str, dict[str, float]]], recipes: Sequence[Recipe], folder: Path
) -> dict[str, Any]:
    """The results: `"calls"`, `"pictures"` and `"verdict"`."""
    calls = {
        name: {unit: median(one[name][unit] for one in rounds) for unit in ("seconds", "relative")}
        for name in rounds[0]
    }
    full = [record.seconds for record in read_manifest(folder / FULL)]
    pictures: dict[str, dict[str, Any]] = {FULL: {"seconds": mean(full), "relative": 1.0}}
    points = []
    for recipe in recipes[1:]:
        seconds = [record.seconds for record in read_manifest(folder / recipe.name)]
        changes = paired_change(folder / FULL, folder / recipe.name).images
        psnr = [change.psnr for change in changes if isfinite(change.psnr)]
        row = {
            "seconds": mean(seconds),
            "relative": mean(a / b for a, b in zip(seconds, full, strict=True)),
            "psnr_db": psnr,
        }
        pictures[recipe.name] = row
        if psnr:
            points.append(_point(recipe.name, row))
    return {"calls": calls, "pictures": pictures, "verdict": verdict(points)}


def _point(name: str, row: dict[str, Any]) -> Point:
    psnr = row["psnr_db"]
    return Point(name, row["relative"], mean(psnr), min(psnr), max(psnr))


def write_pictures(
    folder: Path, base: ResolvedOptions, pictures: dict[str, dict[str, Any]]
) -> None:
    """Draw the plot and the contact sheet of finished pictures."""
    points = [_point(name, row) for name, row in pictures.items() if row.get("psnr_db")]
    title = f"{base.width}x{base.height} px"
    plot_against_time(
        {title: points},
        folder / PLOT,
        full=f"{base.steps} steps unmerged",
        bars="from the farthest to the closest picture",
    )
    labels = [
        f"{name.removeprefix('preset-')}, {row['relative']:.2f}x" for name, row in pictures.items()
    ]
    folders = [folder / PICTURES / name for name in pictures]
    grids = [
        PictureGrid(job.prompt, [""], labels, [[one / job.file for one in folders]])
        for job in plan_images(base)
    ]
    contact_sheet(grids, grids_per_row=1).save(folder / SHEET, quality=90)
