"""The demonstration: the sample pipeline unmerged, merged by each preset, and with fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sd_tokenmerge.config import PRESETS
from sd_tokenmerge.fid.image_change import paired_change
from sd_tokenmerge.files import write_atomically
from sd_tokenmerge.keep_rates import format_keep_rates
from sd_tokenmerge.report.cells import number
from sd_tokenmerge.report.contact_sheet import PictureGrid, contact_sheet
from sd_tokenmerge.report.overlay import draw_cluster_frames, draw_cluster_grid, save_animation
from sd_tokenmerge.sampling.imagenet import CLASSES
from sd_tokenmerge.sampling.load import load_pipeline
from sd_tokenmerge.sampling.manifest import read_manifest
from sd_tokenmerge.sampling.merging import patched
from sd_tokenmerge.sampling.options import GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.plan import plan_images
from sd_tokenmerge.sampling.progress import Progress
from sd_tokenmerge.sampling.recorded import recorded_picture
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.run import generate
from sd_tokenmerge.sampling.sampler import Sampler

UNMERGED = "unmerged"
FEWER_STEPS = (0.8, 0.6)
"""Fractions of the steps in the unmerged pictures with fewer steps."""

_PICTURES = 4


@dataclass(frozen=True)
class DemoRow:
    """One setting, measured on the same prompts and seeds as all others.

    Attributes:
        name: the preset, or how the unmerged pipeline ran.
        tokens_kept: keep rate of the finest level as text.
        steps: denoising steps.
        psnr_db: to the unmerged pictures, mean over pictures; None for these themselves.
        seconds: per picture, in the fastest batch: other processes can only slow it down.
    """

    name: str
    tokens_kept: str
    steps: int
    psnr_db: float | None
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """What the demonstration measured and wrote; the first file is the contact sheet."""

    rows: list[DemoRow]
    files: list[Path]


def run_demo(
    out: Path, progress: Callable[[str], Progress], *, overwrite: bool = False
) -> DemoResult:
    """Run the demonstration; may be interrupted and started again.

    Args:
        out: folder for everything; each setting has a run folder in it.
        progress: makes the receiver of a setting's progress from the setting's name.
        overwrite: replace runs with other options that are in the folder.

    Raises:
        ValueError: the folder holds other runs, or there is no sample pipeline.
        OSError: the folder cannot be written to.
    """
    unmerged = _unmerged(out)
    settings = _settings(out, unmerged)
    pipe = load_pipeline(unmerged)
    for name, options in settings.items():
        generate(options, pipe=pipe, overwrite=overwrite, progress=progress(name))
    rows = [_measure(name, options, unmerged) for name, options in settings.items()]
    files = [_draw_sheet(out, settings, rows), _write_table(out, rows)]
    for name in PRESETS:
        files += _draw_clusters(out, name, pipe, settings[name])
    return DemoResult(rows, files)


def table(rows: Sequence[DemoRow]) -> list[list[str]]:
    """The measurements as text: a header, and a line for each row."""
    header = ["setting", "tokens kept", "steps", "PSNR to unmerged (dB)", "s/picture"]
    return [header] + [
        [row.name, row.tokens_kept, str(row.steps), number(row.psnr_db, 1), number(row.seconds)]
        for row in rows
    ]


def _unmerged(out: Path) -> ResolvedOptions:
    options = GenerateOptions(
        out=str(out / UNMERGED), merging=None, images_per_class=1, batch_size=2
    )
    resolved = resolve_options(options)
    classes = resolved.classes or ()
    step = -(-len(classes) // _PICTURES)
    return replace(resolved, classes=classes[::step])


def _settings(out: Path, unmerged: ResolvedOptions) -> dict[str, ResolvedOptions]:
    """The options of every setting by its name, unmerged first."""
    settings = {UNMERGED: unmerged}
    for name, config in PRESETS.items():
        settings[name] = replace(unmerged, out=str(out / name), merging=config.resolved())
    for fraction in FEWER_STEPS:
        steps = max(1, round(fraction * unmerged.steps))
        name = f"{UNMERGED}, {steps} steps"
        settings[name] = replace(unmerged, out=str(out / f"{steps}-steps"), steps=steps)
    return settings


def _measure(name: str, options: ResolvedOptions, unmerged: ResolvedOptions) -> DemoRow:
    merging = options.merging
    return DemoRow(
        name=name,
        tokens_kept="all" if merging is None else format_keep_rates(merging.keep_rate),  # type: ignore[arg-type]
        steps=options.steps,
        psnr_db=None if name == UNMERGED else paired_change(unmerged.out, options.out).psnr,
        seconds=min(record.seconds for record in read_manifest(options.out)),
    )


def _draw_sheet(out: Path, settings: dict[str, ResolvedOptions], rows: Sequence[DemoRow]) -> Path:
    jobs = plan_images(settings[UNMERGED])
    labels = [
        f"{row.name}:{'' if row.psnr_db is None else f'{number(row.psnr_db, 1)} dB,'}"
        f"{number(row.seconds)} s"
        for row in rows
    ]
    grid = PictureGrid(
        heading="",
        rows=labels,
        columns=[CLASSES[job.class_index].short_name for job in jobs],
        cells=[[Path(options.out, job.file) for job in jobs] for options in settings.values()],
    )
    caption = "One seed in each column; PSNR to the unmerged pictures; seconds per picture."
    path = out / "contact_sheet.png"
    contact_sheet([grid], caption=caption).save(path, optimize=True)
    return path


def _write_table(out: Path, rows: Sequence[DemoRow]) -> Path:
    header, *body = [f"| {' | '.join(line)} |" for line in table(rows)]
    path = out / "table.md"
    write_atomically(path, "\n".join([header, "|---|---|---:|---:|---:|", *body, ""]).encode())
    return path


def _draw_clusters(out: Path, name: str, pipe: object, options: ResolvedOptions) -> list[Path]:
    """The clusters of the first picture under a preset, as a grid and as an animation."""
    job = plan_images(options)[0]
    with patched(pipe, options) as handle:
        picture, _, recording = recorded_picture(handle, Sampler(pipe, options), job)
    sheet, animation = out / f"clusters_{name}.png", out / f"clusters_{name}.gif"
    draw_cluster_grid(picture, recording).save(sheet, optimize=True)
    save_animation(draw_cluster_frames(picture, recording), animation)
    return [sheet, animation]
