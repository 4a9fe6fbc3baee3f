"""`sd-tokenmerge sweep`: generate and measure across methods and keep rates."""

from __future__ import annotations

import errno
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sd_tokenmerge.cli.errors import (
    UserError,
    describe,
    generation_errors,
    interruption,
    user_errors,
)
from sd_tokenmerge.cli.feature_options import (
    AllowUnknownWeights,
    AssumeProtocol,
    Cache,
    DownloadWeights,
    Extractor,
    Precision,
    Protocol,
    Weights,
)
from sd_tokenmerge.cli.field_options import with_options
from sd_tokenmerge.cli.generate import Preset, Size, read_options
from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.fid.options import FeatureOptions
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sweep.options import PAPER_KEEP_RATES, PAPER_METHODS, SweepOptions

if TYPE_CHECKING:
    from sd_tokenmerge.sampling.progress import Progress
    from sd_tokenmerge.sweep.run import SweepSummary

_METHODS_HELP = (
    'Repeatable; several in one are separated by spaces or ";", since commas belong to the options '
    f'of a method: "atc tome-sd:stride=4". Default: {" ".join(PAPER_METHODS)}.'
)
_KEEP_RATES_HELP = (
    'Fractions such as "0.7,0.5" or percentages such as "70%,50%"; repeatable. The unmerged '
    "pipeline (100%) is always measured. Default: "
    f"{','.join(format(rate, 'g') for rate in PAPER_KEEP_RATES)}."
)


@with_options(GenerateOptions, MergeConfig, without=("out", "method", "keep_rate"))
def sweep_command(
    *,
    out: Annotated[str, typer.Option(help="The sweep's folder, new or to be resumed.")],
    reference: Annotated[
        str | None,
        typer.Option(
            help="Folder of reference images, or .npz statistics; default: no distance, only the "
            "change to the unmerged images."
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--methods",
            "--method",
            help=_METHODS_HELP,
        ),
    ] = None,
    keep_rates: Annotated[
        list[str] | None,
        typer.Option(
            "--keep-rates",
            "--keep-rate",
            help=_KEEP_RATES_HELP,
        ),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Show the ATC paper's Table 2 beside the results.")
    ] = False,
    skip_unreachable: Annotated[
        bool,
        typer.Option(
            "--skip-unreachable",
            help="Leave out keep rates that a method cannot reach, instead of refusing.",
        ),
    ] = False,
    sheet_images: Annotated[
        int, typer.Option(help="Images on the contact sheet, each of another class.")
    ] = 4,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, with the time; no more.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace runs with other options in the folder.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    extractor: Extractor = "inception",
    protocol: Protocol = "atc",
    weights: Weights = None,
    download_weights: DownloadWeights = False,
    allow_unknown_weights: AllowUnknownWeights = False,
    precision: Precision = "float32",
    cache: Cache = None,
    assume_protocol: AssumeProtocol = None,
    size: Size = None,
    preset: Preset = None,
    **generation: Any,
) -> None:
    """Compare methods and keep rates: images, distances, tables, plots.

    Generates every setting into a run folder of its own, the unmerged pipeline first and once,
    measures it, and writes table.md, .csv, .json, .tex, distance.png, change.png,
    contact_sheet.jpg and side_by_side.png. The defaults are Table 2 of the ATC paper.

    May be stopped at any moment; the same command goes on where it was, and does only what is
    not up to date. Several processes share the work: `accelerate launch -m sd_tokenmerge sweep
    ...`. Jobs of a cluster can each generate a --shard of every setting; run it without --shard
    in the end, to measure.
    """
    with user_errors():
        options = SweepOptions(
            out=out,
            generation=read_options(generation | {"out": out, "size": size, "preset": preset}),
            methods=PAPER_METHODS if methods is None else parse_methods(methods),
            keep_rates=PAPER_KEEP_RATES if keep_rates is None else parse_keep_rates(keep_rates),
            reference=reference,
            features=FeatureOptions(
                extractor=extractor,
                protocol=protocol,
                weights=weights,
                download_weights=download_weights,
                allow_unknown_weights=allow_unknown_weights,
                precision=precision,
                cache=cache,
                assume_protocol=assume_protocol,
            ),
            published=published,
            skip_unreachable=skip_unreachable,
            sheet_images=sheet_images,
        )
    from sd_tokenmerge.cli.quiet import quiet_libraries

    quiet_libraries()
    if dry_run:
        from sd_tokenmerge.cli.sweep_plan import print_plan

        print_plan(options, overwrite=overwrite, as_json=as_json)
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
    # Divided as text: 70 / 100 is 0.7, but 0.07 * 10 or 0.57 * 100 are not what they look like.
    value = float(f"{digits}e-2" if percent else digits)
    if not percent and value > 1:
        raise ValueError(f"`keep_rates` must be in (0, 1] or have a percent sign, got {text!r}.")
    return value


class _SweepConsole:
    """Implements `sweep.run.SweepProgress` on stderr."""

    def __init__(self) -> None:
        from sd_tokenmerge.cli.progress import ConsoleProgress

        self._features = ConsoleProgress("Features")
        self._first: tuple[int, float] | None = None

    def generating(self, name: str, number: int, count: int) -> Progress:
        from sd_tokenmerge.cli.progress import ConsoleProgress, format_duration

        now = time.monotonic()
        if self._first is None:
            self._first = number, now
        first, started = self._first
        if number > first and os.environ.get("RANK", "0") == "0":
            left = (now - started) / (number - first) * (count - number + 1)
            self.note(f"{number - 1} of {count} settings done, {format_duration(left)} left.")
        return ConsoleProgress(f"{name} ({number} of {count})")

    def extracting(self, done: int, total: int) -> None:
        if done == 0:
            self._features.start(total, 0)
        self._features.update(done)
        if done == total:
            self._features.stop()

    def stop(self) -> None:
        self._features.stop()

    def note(self, message: str) -> None:
        print(message, file=sys.stderr)


def _run(options: SweepOptions, overwrite: bool) -> SweepSummary | None:
    from sd_tokenmerge.sweep.run import run_sweep

    console = _SweepConsole()
    try:
        with generation_errors(), user_errors(ValueError, TypeError):
            return run_sweep(options, overwrite=overwrite, progress=console)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(describe(error)) from error
        raise interruption(error) from error
    finally:
        console.stop()


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
