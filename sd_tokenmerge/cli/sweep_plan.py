"""What `sd-tokenmerge sweep --dry-run` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sd_tokenmerge.cli.columns import in_columns
from sd_tokenmerge.cli.errors import user_errors
from sd_tokenmerge.cli.progress import format_count, format_duration
from sd_tokenmerge.sweep.measure import measured_settings
from sd_tokenmerge.sweep.options import SweepOptions
from sd_tokenmerge.sweep.plan import SweepPlan, plan_sweep


def print_plan(options: SweepOptions, *, overwrite: bool, as_json: bool) -> None:
    """Print every setting with what is there, what is missing and the time it takes."""
    with user_errors():
        plan = plan_sweep(options, overwrite=overwrite)
        measured = measured_settings(options, plan)
    if as_json:
        print(json.dumps(_plan_json(plan, measured), indent=2))
        return
    rows = [["setting", "images", "there", "missing", "time", "measured"]]
    for run, is_measured in zip(plan.runs, measured, strict=True):
        seconds = plan.seconds_left(run)
        time = "" if not run.num_missing else "?" if seconds is None else format_duration(seconds)
        counts = (run.num_images, run.num_done, run.num_missing)
        name = f"{run.setting}{' (replaced)' if run.is_replaced else ''}"
        rows.append([name, *map(str, counts), time, "yes" if is_measured else "no"])
    print(in_columns(rows))
    for note in plan.skipped:
        print(note)
    print(f"To do: {_todo(plan, measured)}.")


def _todo(plan: SweepPlan, measured: Sequence[bool]) -> str:
    seconds = plan.total_seconds_left
    if not plan.num_missing:
        time = ""
    elif seconds is None:
        time = " (time unknown: none of this sweep was made yet)"
    else:
        time = f", about {format_duration(seconds)} in one process by those made so far"
    images, settings = (plan.num_missing, "image"), (measured.count(False), "setting")
    return f"{format_count(*images)}{time}; {format_count(*settings)} to measure"


def _plan_json(plan: SweepPlan, measured: Sequence[bool]) -> dict[str, Any]:
    return {
        "runs": [
            {
                "setting": str(run.setting),
                "folder": str(run.setting.folder),
                "images": run.num_images,
                "there": run.num_done,
                "missing": run.num_missing,
                "seconds": plan.seconds_left(run) if run.num_missing else 0.0,
                "replaced": run.is_replaced,
                "measured": is_measured,
            }
            for run, is_measured in zip(plan.runs, measured, strict=True)
        ],
        "skipped": list(plan.skipped),
        "missing": plan.num_missing,
        "seconds": plan.total_seconds_left,
    }
