"""The output of `sd-tokenmerge sweep --dry-run`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sd_tokenmerge.cli.columns import in_columns
from sd_tokenmerge.cli.errors import user_errors
from sd_tokenmerge.cli.progress import format_count, format_duration
from sd_tokenmerge.sweep.measure import Measurer
from sd_tokenmerge.sweep.options import SweepOptions
from sd_tokenmerge.sweep.plan import SweepPlan, plan_sweep


def print_plan(
    options: SweepOptions, *, overwrite: bool, as_json: bool, flags: Mapping[str, str]
) -> None:
    """Print every setting with its images and the time to generate the missing ones.

    Args:
        options: of the sweep.
        overwrite: whether runs with other options will be replaced.
        as_json: print JSON.
        flags: flags by the library's names, for errors.

    Raises:
        UserError: an option or the folder is bad.
    """
    with user_errors(flags=flags):
        plan = plan_sweep(options, overwrite=overwrite)
        Measurer(options)  # checks the reference and the extractor
    if as_json:
        print(json.dumps(_plan_json(plan), indent=2))
        return
    rows = [["setting", "images", "there", "missing", "time"]]
    for run in plan.runs:
        seconds = plan.seconds_left(run)
        time = "" if not run.num_missing else "?" if seconds is None else format_duration(seconds)
        counts = (run.num_images, run.num_done, run.num_missing)
        name = f"{run.setting}{' (replaced)' if run.is_replaced else ''}"
        rows.append([name, *map(str, counts), time])
    print(in_columns(rows))
    for note in plan.skipped:
        print(note)
    one = plan.options
    steps, guidance = format_count(one.steps, "step"), f"guidance {one.guidance_scale:g}"
    print(f"Each image: {one.width}x{one.height} pixels, {steps}, {guidance}.")
    print(f"To generate: {_todo(plan)}.")


def _todo(plan: SweepPlan) -> str:
    images, seconds = format_count(plan.num_missing, "image"), plan.total_seconds_left
    if not plan.num_missing:
        return images
    if seconds is None:
        return f"{images} (time unknown: this sweep has no image yet)"
    return f"{images}, about {format_duration(seconds)} in one process at the speed so far"


def _plan_json(plan: SweepPlan) -> dict[str, Any]:
    names = ("height", "width", "steps", "guidance_scale")
    return {
        **{name: getattr(plan.options, name) for name in names},
        "runs": [
            {
                "setting": str(run.setting),
                "folder": str(run.setting.folder),
                "images": run.num_images,
                "there": run.num_done,
                "missing": run.num_missing,
                "seconds": plan.seconds_left(run) if run.num_missing else 0.0,
                "replaced": run.is_replaced,
            }
            for run in plan.runs
        ],
        "skipped": list(plan.skipped),
        "missing": plan.num_missing,
        "seconds": plan.total_seconds_left,
    }
