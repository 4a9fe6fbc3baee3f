"""`sd-tokenmerge sweep`: generate and measure across methods and keep rates."""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sd_tokenmerge.cli.errors import (
    UserError,
    generation_errors,
    interruption,
    user_errors,
)
from sd_tokenmerge.cli.field_options import given_values, with_options
from sd_tokenmerge.cli.generate import AsJson, Overwrite, Preset, Size, read_options
from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.fid.options import FeatureOptions
from sd_tokenmerge.files import describe_error
from sd_tokenmerge.processes import is_first_process, leave_group
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sweep.options import PAPER_KEEP_RATES, PAPER_METHODS, SweepOptions

if TYPE_CHECKING:
    from sd_tokenmerge.sampling.progress import Progress
    from sd_tokenmerge.sweep.run import SweepSummary

FLAGS = {"method": "--methods", "keep_rate": "--keep-rates"}
"""Flags of the options that take several values in a sweep."""

_METHODS_HELP = (
    'Method strings separated by spaces or ";", since commas separate the options of a method: '
    f'"atc tome-sd:stride=4"; repeatable. Default: {" ".join(PAPER_METHODS)}.'
)
_KEEP_RATES_HELP = (
    'Fractions such as "0.7,0.5" or percentages such as "70%,50%"; repeatable. The unmerged '
    "pipeline (100%) is always measured. Default: "
    f"{','.join(format(rate, 'g') for rate in PAPER_KEEP_RATES)}."
)


@with_options(
    SweepOptions,
    FeatureOptions,
    GenerateOptions,
    MergeConfig,
    without=("out", "method", "keep_rate"),
)
def sweep_command(
    *,
    out: Annotated[str, typer.Option(help="Sweep folder, a new one or one to resume.")],
    methods: Annotated[
        list[str] | None, typer.Option("--methods", help=_METHODS_HELP, rich_help_panel="Sweep")
    ] = None,
    keep_rates: Annotated[
        list[str] | None,
        typer.Option("--keep-rates", help=_KEEP_RATES_HELP, rich_help_panel="Sweep"),
    ] = None,
    size: Size = None,
    preset: Preset = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan with the expected time, and stop; opens no reference images.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    **values: Any,
) -> None:
    """Compare methods and keep rates: images, distances, tables, plots.

    Generates every setting into a run folder of its own, the unmerged pipeline first, measures it,
    and writes index.html, which shows everything, table.md, .csv, .json, .tex, distance.png,
    change.png, contact_sheet.jpg and side_by_side.png. The defaults are Table 2 of the ATC paper.

    May be stopped at any moment; the same command resumes. Several processes share the work:
    `accelerate launch -m sd_tokenmerge sweep ...`. Jobs of a cluster can each generate a --shard
    of every setting; run the command without --shard afterwards to measure.
    """
    generation = read_options(values | {"out": out, "size": size, "preset": preset})
    with user_errors(TypeError, ValueError):
        options = SweepOptions(
            out=out,
            generation=generation,
            features=FeatureOptions(**given_values(FeatureOptions, values)),
            methods=parse_methods(methods) if methods else PAPER_METHODS,
            keep_rates=parse_keep_rates(keep_rates) if keep_rates else PAPER_KEEP_RATES,
            **given_values(SweepOptions, values),
        )
    from sd_tokenmerge.cli.quiet import quiet_libraries

    quiet_libraries()
    if dry_run:
        from sd_tokenmerge.cli.sweep_plan import print_plan

        print_plan(options, overwrite=overwrite, as_json=as_json, flags=FLAGS)
        return
    summary = _run(options, overwrite)
    if summary is not None:
        _print_summary(summary, as_json)


def parse_methods(entries: Sequence[str]) -> tuple[str, ...]:
    """Method strings separated by spaces or semicolons."""
    return tuple(name for entry in entries for name in re.split(r"[\s;]+", entry) if name)


def parse_keep_rates(entries: Sequence[str]) -> tuple[float, ...]:
    """Fractions and percentages separated by commas or spaces.

    Raises:
        ValueError: an entry is neither, or a number above 1 without a percent sign.
    """
    texts = [text for entry in entries for text in re.split(r"[\s,;]+", entry) if text]
    return tuple(_keep_rate(text) for text in texts)


def _keep_rate(text: str) -> float:
    digits, percent = (text[:-1], True) if text.endswith("%") else (text, False)
    if re.fullmatch(r"\d*\.?\d+", digits) is None:
        raise ValueError(
            f"`keep_rates` must be numbers such as 0.7 or 70%, got {text!r}: a table has a column "
            f"for each number, and `generate` takes keep rates that change."
        )
    # Scaled as text, so that 57% is exactly the number that a user writes as 0.57.
    value = float(f"{digits}e-2" if percent else digits)
    if not percent and value > 1:
        raise ValueError(f"`keep_rates` must be in (0, 1] or have a percent sign, got {text!r}.")
    return value


class _SweepConsole:
    """Implements `sweep.run.SweepProgress` on stderr."""

    def __init__(self) -> None:
        from sd_tokenmerge.cli.progress import FeatureProgress

        self.extracting = FeatureProgress()
        self._first: tuple[int, float] | None = None

    def generating(self, name: str, number: int, count: int) -> Progress:
        from sd_tokenmerge.cli.progress import ConsoleProgress, format_duration

        now = time.monotonic()
        if self._first is None:
            self._first = number, now
        first, started = self._first
        if number > first and is_first_process():
            left = (now - started) / (number - first) * (count - number + 1)
            done = f"{number - 1} of {count} settings done"
            print(f"{done}, {format_duration(left)} left.", file=sys.stderr)
        return ConsoleProgress(f"{name} ({number} of {count})")


def _run(options: SweepOptions, overwrite: bool) -> SweepSummary | None:
    from sd_tokenmerge.sweep.run import run_sweep

    console = _SweepConsole()
    try:
        with generation_errors(), user_errors(TypeError, ValueError, flags=FLAGS):
            return run_sweep(options, overwrite=overwrite, progress=console)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(describe_error(error)) from error
        raise interruption(error) from error
    finally:
        console.extracting.stop()
        leave_group()


def _print_summary(summary: SweepSummary, as_json: bool) -> None:
    from sd_tokenmerge.cli.progress import format_count

    images = format_count(summary.num_generated, "image")
    if summary.results is None:
        print(
            f"{summary.folder}: {images} of this shard generated. When all "
            f"shards are done, run the same command without --shard to measure.",
            file=sys.stderr,
        )
        return
    tables = summary.results.tables()
    print(tables["table.json" if as_json else "table.md"].decode(), end="")
    files = ", ".join(summary.files)
    print(f"{images} generated; results in {summary.folder}: {files}.", file=sys.stderr)
