"""Turn the rows of a sweep into its tables, plots and pictures."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sd_tokenmerge.report.captions import printable, short_name
from sd_tokenmerge.report.cells import keep_rate_text, listing, pivots
from sd_tokenmerge.report.contact_sheet import PictureGrid, contact_sheet, side_by_side
from sd_tokenmerge.report.page import Page, Picture, page_html
from sd_tokenmerge.report.plot import plot_change, plot_distance, png_bytes
from sd_tokenmerge.report.published import ATC_SOURCE, atc_table2
from sd_tokenmerge.report.rows import SweepRow, conditions_sentence
from sd_tokenmerge.report.table import csv_text, json_text, latex, markdown
from sd_tokenmerge.sampling.description import Description, read_description
from sd_tokenmerge.sampling.imagenet import CLASSES
from sd_tokenmerge.sampling.manifest import ImageRecord, read_manifest
from sd_tokenmerge.sweep.options import SweepOptions
from sd_tokenmerge.sweep.settings import Setting

_TITLES = {
    "distance.png": "Distance to the reference",
    "change.png": "Change from the unmerged pictures",
    "contact_sheet.jpg": "All settings",
    "side_by_side.png": "Unmerged beside merged",
}


@dataclass(frozen=True)
class Results:
    """Everything that a sweep writes.

    Attributes:
        rows: one per setting, the unmerged pipeline first.
        settings: those of the rows.
        measured_on: images, extractor and protocol that all rows share.
        made_with: model, generation options and device that all rows share.
        versions: of libraries.
        published: rows to show beside the measured ones.
        notes: sentences to print below the tables.
        sheet_images: images on the contact sheet.
    """

    rows: list[SweepRow]
    settings: list[Setting]
    measured_on: dict[str, str]
    made_with: dict[str, str]
    versions: dict[str, str]
    published: list[SweepRow]
    notes: list[str]
    sheet_images: int

    @property
    def conditions(self) -> dict[str, str]:
        """Everything that all rows have in common."""
        return self.measured_on | self.made_with | self.versions

    def files(self) -> dict[str, bytes]:
        """Every result by file name."""
        plots, pictures = self._plots(), self._pictures()
        return (
            self.tables()
            | plots
            | pictures
            | {"index.html": page_html(self._page(plots, pictures))}
        )

    def tables(self) -> dict[str, bytes]:
        """The tables by file name."""
        extra: dict[str, Any] = {"published": self.published, "notes": self.notes}
        texts = {
            "table.md": markdown(self.rows, self.conditions, **extra),
            "table.csv": csv_text([*self.rows, *self.published]),
            "table.json": json_text(self.rows, self.conditions, **extra),
            "table.tex": latex(self.rows, self.conditions, **extra),
        }
        return {name: text.encode() for name, text in texts.items()}

    def _plots(self) -> dict[str, bytes]:
        """The plots by file name; those without measurements are left out."""
        caption = conditions_sentence(self.conditions)
        merged = [row for row in self.rows if not row.is_baseline]
        plots = {}
        if any(row.fid is not None for row in merged):
            figure = plot_distance(self.rows, published=self.published, caption=caption)
            plots["distance.png"] = png_bytes(figure)
        if any(row.psnr_db not in (None, math.inf) for row in merged):
            plots["change.png"] = png_bytes(plot_change(self.rows, caption=caption))
        return plots

    def _pictures(self) -> dict[str, bytes]:
        """The contact sheet, and unmerged beside merged, by file name."""
        unmerged, *merged = self.settings
        records = _spread(read_manifest(unmerged.folder), self.sheet_images)
        made_with = conditions_sentence(self.made_with)
        caption = f"Same seed in all pictures of a group; {made_with}"
        sheet = contact_sheet([_grid(self.settings, r) for r in records], caption=caption)
        drawn = {"contact_sheet.jpg": sheet}
        if merged:
            first = [setting for setting in merged if setting.label == merged[0].label]
            chosen = min(first, key=lambda setting: abs(setting.keep_rate - 0.5))
            drawn["side_by_side.png"] = side_by_side(
                [(unmerged.folder / r.file, chosen.folder / r.file) for r in records],
                ("unmerged", f"{keep_rate_text(chosen.keep_rate)} of the tokens"),
                headings=[_heading(unmerged, record) for record in records],
                caption=f"Merged by {chosen.label}. {caption}",
            )
        return {name: _encoded(picture, Path(name).suffix) for name, picture in drawn.items()}

    def _page(self, plots: dict[str, bytes], pictures: dict[str, bytes]) -> Page:
        return Page(
            title=f"Token merging on {self.made_with['model']}",
            lead=["Each setting generates the same pictures: prompts and seeds are equal."],
            pictures=[
                Picture(_TITLES[name], name, data, is_plot=name in plots)
                for name, data in (plots | pictures).items()
            ],
            tables=[*pivots(self.rows, self.published), listing(self.rows)],
            notes=self.notes,
            settings=self.made_with | self.measured_on,
            versions=self.versions,
        )


def make_results(
    options: SweepOptions,
    measured: Sequence[tuple[Setting, SweepRow]],
    notes: Sequence[str],
) -> Results:
    """Combine rows, conditions and notes.

    Args:
        options: of the sweep.
        measured: finished settings, the unmerged pipeline first.
        notes: of the plan.
    """
    settings = [setting for setting, _ in measured]
    rows = [row for _, row in measured]
    published = atc_table2() if options.published else []
    sources = [f"Published values: {ATC_SOURCE}"] if published else []
    runs = [found for one in settings if (found := read_description(one.folder)) is not None]
    return Results(
        rows=rows,
        settings=settings,
        measured_on=_measured_on(rows[0]),
        made_with=_made_with(runs),
        versions=_versions(runs),
        published=published,
        notes=[*notes, *_notes(measured), *sources],
        sheet_images=options.sheet_images,
    )


def _notes(measured: Sequence[tuple[Setting, SweepRow]]) -> list[str]:
    """The rows' notes, preceded by the settings' names unless all have the same note."""
    settings: dict[str, list[str]] = {}
    for setting, row in measured:
        for note in row.notes:
            settings.setdefault(note, []).append(str(setting))
    return [
        note if len(names) == len(measured) else f"{', '.join(names)}: {note}"
        for note, names in settings.items()
    ]


def _measured_on(row: SweepRow) -> dict[str, str]:
    values = {
        "N generated": row.num_generated,
        "N reference": row.num_reference,
        "extractor": row.extractor,
        "protocol": row.protocol,
    }
    return {
        name: f"{value:,}" if isinstance(value, int) else value
        for name, value in values.items()
        if value is not None
    }


def _made_with(runs: Sequence[Description]) -> dict[str, str]:
    """Model, options and device from the descriptions of the runs."""
    options = runs[0].options
    merging = runs[-1].options.merging
    differing = {} if merging is None else merging.differing()
    devices = sorted({printable(f"{run.device['type']} {run.device['name']}") for run in runs})
    return {
        "model": f"{short_name(str(options.model))} ({runs[0].model['pipeline']['sha256'][:8]})",
        "size": f"{options.width}x{options.height}",
        "steps": str(options.steps),
        "guidance": f"{options.guidance_scale:g}",
        "dtype": str(options.dtype),
        "batch": str(options.batch_size),
        "base seed": str(options.seed),
        **{_readable(name): str(value).lower() for name, value in differing.items()},
        "device": ", ".join(devices),
    }


def _readable(name: str) -> str:
    return "merge seed" if name == "seed" else name.replace("_", " ")


def _versions(runs: Sequence[Description]) -> dict[str, str]:
    versions = {name: runs[0].versions[name] for name in ("sd-tokenmerge", "torch", "diffusers")}
    commits = sorted({_short_commit(run.commit) for run in runs if run.commit})
    if len(commits) > 2:
        commits = [f"{commits[0]} and {len(commits) - 1} others"]
    return versions | ({"commit": ", ".join(commits)} if commits else {})


def _short_commit(commit: str) -> str:
    return commit[:9] + ("+" if commit.endswith("+") else "")


def _spread(records: Sequence[ImageRecord], count: int) -> list[ImageRecord]:
    """The first images of `count` classes, spread evenly over all classes."""
    first = [record for record in records if record.image_index == 0]
    count = min(count, len(first))
    return [first[len(first) * i // count] for i in range(count)]


def _grid(settings: Sequence[Setting], record: ImageRecord) -> PictureGrid:
    files = {(s.label, s.keep_rate): s.folder / record.file for s in settings}
    baseline = settings[0].folder / record.file
    labels = list(dict.fromkeys(s.label for s in settings if not s.is_baseline)) or ["unmerged"]
    keep_rates = sorted({setting.keep_rate for setting in settings}, reverse=True)
    return PictureGrid(
        heading=_heading(settings[0], record),
        rows=labels,
        columns=[keep_rate_text(keep_rate) for keep_rate in keep_rates],
        cells=[
            [baseline if rate == 1 else files.get((label, rate)) for rate in keep_rates]
            for label in labels
        ],
    )


def _heading(setting: Setting, record: ImageRecord) -> str:
    """The class, or the prompt if the run has prompts instead of classes."""
    is_class = setting.options.prompts is None
    return CLASSES[record.class_index].short_name if is_class else record.prompt


def _encoded(picture: Image.Image, suffix: str) -> bytes:
    out = io.BytesIO()
    if suffix == ".jpg":  # a third of the size; colours keep their resolution
        picture.save(out, format="jpeg", quality=90, subsampling=0, optimize=True)
    else:
        picture.save(out, format="png", optimize=True)
    return out.getvalue()
