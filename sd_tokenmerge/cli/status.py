"""`sd-tokenmerge status`: what is done, missing and broken in a run or sweep folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from sd_tokenmerge.cli.errors import user_errors

if TYPE_CHECKING:
    from sd_tokenmerge.sampling.status import RunStatus


def status_command(
    folder: Annotated[str, typer.Argument(help="A run folder, or a folder of run folders.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what is done, missing and broken in a run or sweep folder.

    Every image is read and compared with the manifest; nothing is changed. The exit code is 0 if
    everything is complete and intact, else 1.
    """
    from sd_tokenmerge.sampling.status import find_runs, run_status

    with user_errors():
        statuses = [run_status(path) for path in find_runs(folder)]
    if as_json:
        print(json.dumps([asdict(status) for status in statuses], indent=2))
    else:
        _print_table(statuses)
    if not all(status.is_complete for status in statuses):
        raise typer.Exit(1)


def _print_table(statuses: list[RunStatus]) -> None:
    rows = [["folder", "method", "keep", "images", "done", "missing", "broken", ""]]
    for status in statuses:
        counts = (status.total, status.done, status.missing, status.broken)
        state = "running" if status.is_running else "complete" if status.is_complete else ""
        rows.append(
            [status.folder, status.method, f"{status.keep_rate:g}", *map(str, counts), state]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    for status in statuses:
        for finding in status.findings:
            print(f"{status.folder}: {finding}")
