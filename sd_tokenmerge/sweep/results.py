"""Turn the measurements of a sweep into its tables, plots and pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from sd_tokenmerge.report.cells import keep_rate_text
from sd_tokenmerge.report.contact_sheet import PictureGrid, contact_sheet, side_by_side
from sd_tokenmerge.report.plot import plot_change, plot_distance, png_bytes
from sd_tokenmerge.report.published import ATC_SOURCE, atc_table2
from sd_tokenmerge.report.rows import BASELINE, Conditions, SweepRow
from sd_tokenmerge.report.table import csv_text, json_text, latex, markdown
from sd_tokenmerge.sampling.description import read_description
from sd_tokenmerge.sampling.imagenet import CLASSES
from sd_tokenmerge.sampling.manifest import ImageRecord, read_manifest
from sd_tokenmerge.sampling.options import MERGING, GenerateOptions
from sd_tokenmerge.sweep.options import SweepOptions
from sd_tokenmerge.sweep.settings import Setting
from sd_tokenmerge.sweep.state import Measurement, content_key

RESULTS = 3
"""Version of what is drawn and written: a new one writes everything again."""


@dataclass(frozen=True)
class Results:
    """Everything that is shown.

    Attributes:
        rows: one per setting, the unmerged pipeline first.
        conditions: what they have in common.
        published: rows to show beside them.
        notes: sentences to print below the tables.
    """

    rows: list[SweepRow]
    conditions: Conditions
    published: list[SweepRow]
    notes: list[str]

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

    def plots(self) -> dict[str, bytes]:
        """The plots by file name, those for which something was measured."""
        caption = self.conditions.line()
        merged = [row for row in self.rows if not row.is_baseline]
        plots = {}
        if any(row.fid is not None for row in merged):
            figure = plot_distance(self.rows, published=self.published, caption=caption)
            plots["distance.png"] = png_bytes(figure)
        if any(row.psnr_db not in (None, float("inf")) for row in merged):
            plots["change.png"] = png_bytes(plot_change(self.rows, caption=caption))
        return plots

    def key(self, pictures: Sequence[str]) -> str:
        """A hash over all that tables, plots and pictures are made from."""
        drawn_with = [version("matplotlib"), version("pillow")]
        text = json_text(self.rows, self.conditions, published=self.published, notes=self.notes)
        return content_key([RESULTS, drawn_with, text, list(pictures)])


def make_results(
    options: SweepOptions,
    measured: Sequence[tuple[Setting, Measurement]],
    notes: Sequence[str],
) -> Results:
    """Put rows, conditions and notes together.

    Args:
        options: of the sweep.
        measured: the settings that are done, the unmerged pipeline first.
        notes: of the plan.
    """
    rows = [_row(options, setting, measurement) for setting, measurement in measured]
    published = atc_table2() if options.published else []
    sources = [f"Published values: {ATC_SOURCE}"] if published else []
    conditions = _conditions(options, [setting for setting, _ in measured], rows)
    return Results(rows, conditions, published, [*notes, *_said(measured), *sources])


def chosen_records(folder: Path, count: int) -> list[ImageRecord]:
    """Which images are shown: the first of each of `count` classes, spread over all."""
    first = [record for record in read_manifest(folder) if record.image_index == 0]
    count = min(count, len(first))
    return [first[len(first) * i // count] for i in range(count)]


def draw_pictures(
    settings: Sequence[Setting], records: Sequence[ImageRecord], conditions: Conditions
) -> dict[str, bytes]:
    """The contact sheet, and unmerged beside merged, by file name."""
    of_pictures = Conditions(
        model=conditions.model, device=conditions.device, settings=conditions.settings
    )
    caption = f"Same seed in all pictures of a group; {of_pictures.line()}"
    grids = [_grid(settings, record) for record in records]
    drawn = {"contact_sheet.jpg": contact_sheet(grids, caption=caption)}
    merged = [setting for setting in settings if not setting.is_baseline]
    if merged:
        first = [setting for setting in merged if setting.label == merged[0].label]
        chosen = min(first, key=lambda setting: abs(setting.keep_rate - 0.5))
        drawn["side_by_side.png"] = side_by_side(
            [(settings[0].folder / r.file, chosen.folder / r.file) for r in records],
            ("unmerged", f"{keep_rate_text(chosen.keep_rate)} of the tokens"),
            headings=[_heading(settings[0], record) for record in records],
            caption=f"Merged by {chosen.label}. {caption}",
        )
    return {name: _encode(picture, Path(name).suffix) for name, picture in drawn.items()}


def picture_hashes(settings: Sequence[Setting], records: Sequence[ImageRecord]) -> list[str]:
    """Hashes of the images that `draw_pictures` shows."""
    shown = {record.file for record in records}
    return [
        record.sha256
        for setting in settings
        for record in read_manifest(setting.folder)
        if record.file in shown
    ]


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
    """The class, or the prompt where prompts were given."""
    is_class = setting.options.prompts is None
    return CLASSES[record.class_index].short_name if is_class else record.prompt


def _said(measured: Sequence[tuple[Setting, Measurement]]) -> list[str]:
    """The measurements' notes; with the setting's name where they are not of all."""
    settings: dict[str, list[str]] = {}
    for setting, measurement in measured:
        for note in measurement.notes:
            settings.setdefault(note, []).append(str(setting))
    return [
        note if len(names) == len(measured) else f"{', '.join(names)}: {note}"
        for note, names in settings.items()
    ]


def _row(options: SweepOptions, setting: Setting, measurement: Measurement) -> SweepRow:
    with_distance = options.reference is not None
    return SweepRow(
        method=BASELINE if setting.is_baseline else setting.options.method,
        keep_rate=setting.keep_rate,
        label=setting.label,
        extractor=options.extractor if with_distance else None,
        protocol=options.protocol if with_distance else None,
        seconds_per_image=median(record.seconds for record in read_manifest(setting.folder)),
        **measurement.numbers(),
    )


def _conditions(
    options: SweepOptions, settings: Sequence[Setting], rows: Sequence[SweepRow]
) -> Conditions:
    """Read from the run folders what their images were made with."""
    runs = [read_description(setting.folder) or {} for setting in settings]
    made_with: Mapping[str, Any] = runs[0]["options"]
    model = f"{_short_name(made_with['model'])} ({runs[0]['model']['pipeline']['sha256'][:8]})"
    settings_text = {
        "size": f"{made_with['width']}x{made_with['height']}",
        "steps": str(made_with["steps"]),
        "guidance": f"{made_with['guidance_scale']:g}",
        "dtype": made_with["dtype"],
        "batch": str(made_with["batch_size"]),
        "base seed": str(made_with["seed"]),
    }
    if len(settings) > 1:
        settings_text |= _merging_text(runs[1]["options"])
    devices = sorted({f"{run['device']['type']} {run['device']['name']}" for run in runs})
    commits = sorted({_short_commit(run["commit"]) for run in runs if run["commit"]})
    versions = {name: runs[0]["versions"][name] for name in ("sd-tokenmerge", "torch", "diffusers")}
    return Conditions(
        num_generated=rows[0].num_generated,
        num_reference=rows[0].num_reference,
        extractor=rows[0].extractor,
        protocol=rows[0].protocol,
        model=model,
        device=", ".join(devices),
        settings=settings_text,
        versions=versions | ({"commit": _listed(commits)} if commits else {}),
    )


def _merging_text(made_with: Mapping[str, Any]) -> dict[str, str]:
    """How was merged, where it is not as in the papers."""
    return {
        f.name.replace("_", " "): str(made_with[f.name])
        for f in fields(GenerateOptions)
        if f.name in MERGING and made_with[f.name] != f.default
    }


def _short_name(model: str) -> str:
    """A model's name without the part of its path that says where this machine keeps it."""
    path = Path(model)
    return "/".join(path.parts[-2:]) if path.is_absolute() else model


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} others"


def _short_commit(commit: str) -> str:
    return commit[:9] + ("+" if commit.endswith("+") else "")


def _encode(picture: Image.Image, suffix: str) -> bytes:
    out = io.BytesIO()
    if suffix == ".jpg":  # a third of the size; colours keep their resolution
        picture.save(out, format="jpeg", quality=90, subsampling=0, optimize=True)
    else:
        picture.save(out, format="png", optimize=True)
    return out.getvalue()
