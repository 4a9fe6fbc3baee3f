"""`sd-tokenmerge status`: images done, missing and broken in a run or sweep folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sd_tokenmerge.cli.columns import in_columns
from sd_tokenmerge.cli.errors import user_errors
from sd_tokenmerge.report.captions import printable

if TYPE_CHECKING:
    from sd_tokenmerge.sampling.status import RunStatus
    from sd_tokenmerge.sweep.status import FolderStatus, SweepStatus


def status_command(
    folder: Annotated[str, typer.Argument(help="A run or sweep folder, or a folder of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which images of a run or sweep folder are done, missing and broken.

    Every image is read and compared with its recorded hash; nothing is changed. The exit code is 0
    if everything is complete and intact, else 1.
    """
    from sd_tokenmerge.sweep.status import folder_status

    with user_errors():
        status = folder_status(folder)
    if as_json:
        print(json.dumps(_to_json(status), indent=2))
    else:
        _print_runs(status.runs, Path(folder))
        for sweep in status.sweeps:
            _print_sweep(sweep)
    if not status.is_complete:
        raise typer.Exit(1)


def _to_json(status: FolderStatus) -> dict[str, Any]:
    content = {"complete": status.is_complete, **asdict(status)}
    for one in (*content["runs"], *content["sweeps"]):
        one["findings"] = [_with_flags(finding).replace("`", "") for finding in one["findings"]]
    return content


def _print_runs(runs: tuple[RunStatus, ...], folder: Path) -> None:
    rows = [["folder", "method", "keep", "images", "done", "missing", "broken", ""]]
    for run in runs:
        counts = (run.total, run.done, run.missing, run.broken)
        path = Path(run.folder)
        name = path if path == folder else path.relative_to(folder)
        rows.append([str(name), run.method, run.keep_rate, *map(str, counts), run.state])
    print(in_columns(rows, left=(0, 1, 7)))
    for run in runs:
        for finding in run.findings:
            print(printable(f"{run.folder}: {_with_flags(finding)}"))


def _with_flags(finding: str) -> str:
    return finding.replace("`overwrite`", "--overwrite").replace("`out`", "--out")


def _print_sweep(sweep: SweepStatus) -> None:
    if sweep.settings:
        print(f"{sweep.folder}: {sweep.tabulated} of {sweep.settings} settings in the tables")
    for finding in sweep.findings:
        print(printable(f"{sweep.folder}: {finding}"))
