"""`sd-tokenmerge generate`: images per class under fixed seeds, in a resumable folder."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sd_tokenmerge.cli.errors import generation_errors, interruption, user_errors
from sd_tokenmerge.cli.field_options import flags_of, given_values, with_options
from sd_tokenmerge.config import PRESETS, MergeConfig, make_config
from sd_tokenmerge.sampling.options import (
    FAMILY_DEFAULT,
    NO_METHOD,
    PAPER_SIZE,
    GenerateOptions,
)

if TYPE_CHECKING:
    from sd_tokenmerge.sampling.run import RunSummary

Preset = Annotated[
    str | None,
    typer.Option(
        help="A named set of merging options; options given as well replace its values. "
        f"One of {', '.join(PRESETS)}. Default: paper.",
        rich_help_panel="Merging",
    ),
]
Size = Annotated[
    int | None,
    typer.Option(
        help=f"Height and width in pixels. Default: {FAMILY_DEFAULT.format(PAPER_SIZE)}.",
        rich_help_panel="Images",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace runs with other options in the folder."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@with_options(GenerateOptions, MergeConfig)
def generate_command(
    *,
    size: Size = None,
    preset: Preset = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    **values: Any,
) -> None:
    """Generate images per class under fixed seeds.

    The defaults are the protocol of the ATC paper: two images of each ImageNet class. May be
    stopped at any moment; the same command resumes. Several processes share the work:
    `accelerate launch -m sd_tokenmerge generate ...`. --method none generates with the unpatched
    pipeline.
    """
    options = read_options(values | {"size": size, "preset": preset})
    summary = run_generation(options, overwrite=overwrite)
    if summary is not None:
        _print_summary(summary, options.shard, as_json)


def read_options(values: dict[str, Any]) -> GenerateOptions:
    """The options that a command line describes, checked.

    Args:
        values: the parameters that `with_options` makes of `GenerateOptions` and `MergeConfig`,
            `size` and `preset`; None or missing for those that were not given.

    Raises:
        UserError: a value is out of range, or two options exclude each other.
    """
    with user_errors(TypeError, ValueError):
        given = given_values(GenerateOptions, values) | read_size(values)
        is_merged = values.get("method") != NO_METHOD
        if not is_merged:
            _refuse_merging_options(values)
    merging = read_merging(values) if is_merged else None
    with user_errors(TypeError, ValueError):
        return GenerateOptions(**given, merging=merging)


def read_merging(values: dict[str, Any]) -> MergeConfig:
    """The merging options that a command line describes, checked.

    Args:
        values: the parameters that `with_options` makes of `MergeConfig`, and `preset`.

    Raises:
        UserError: a value is out of range, or two options exclude each other.
    """
    with user_errors(TypeError, ValueError, flags=flags_of(MergeConfig)):
        given = given_values(MergeConfig, values)
        return make_config(preset=values.get("preset") or "paper", **given)


def read_size(values: dict[str, Any]) -> dict[str, int]:
    """Height and width from `size`, if it was given.

    Raises:
        ValueError: `height` or `width` was given as well.
    """
    size = values.get("size")
    if size is None:
        return {}
    if values.get("height") is not None or values.get("width") is not None:
        raise ValueError("--size excludes --height and --width, got both.")
    return {"height": size, "width": size}


def _refuse_merging_options(values: dict[str, Any]) -> None:
    flags = flags_of(MergeConfig)
    given = [flags[name] for name in given_values(MergeConfig, values) if name != "method"]
    if values.get("preset") is not None:
        given.append("--preset")
    if given:
        raise ValueError(f"--method {NO_METHOD} excludes {given[0]}, got both.")


def run_generation(options: GenerateOptions, *, overwrite: bool = False) -> RunSummary | None:
    """Generate, with progress and errors on stderr.

    Returns:
        The summary; None in a process that is not the first of several.

    Raises:
        UserError: the input is invalid, the disk or the memory is full, or images have NaN pixels.
    """
    from sd_tokenmerge.cli.progress import ConsoleProgress
    from sd_tokenmerge.cli.quiet import quiet_libraries

    quiet_libraries()

    from sd_tokenmerge.processes import leave_group
    from sd_tokenmerge.sampling.run import open_run

    with generation_errors(), ExitStack() as stack:
        stack.callback(leave_group)
        with user_errors():
            opened = open_run(options, overwrite=overwrite, progress=ConsoleProgress())
            run = stack.enter_context(opened)
        try:
            summary = run.execute()
        except OSError as error:
            raise interruption(error) from error
    return summary if run.is_first_process else None


def _print_summary(summary: RunSummary, shard: str | None, as_json: bool) -> None:
    import json

    from sd_tokenmerge.cli.progress import format_count, format_duration, format_rate

    if as_json:
        print(json.dumps(asdict(summary) | {"images_per_second": summary.images_per_second}))
        return
    made = f"{summary.generated} generated"
    if summary.generated:
        rate = format_rate(summary.images_per_second)
        made += f" in {format_duration(summary.seconds)} ({rate})"
    images = format_count(summary.num_images, "image")
    there = f"{summary.already_there} {'was' if summary.already_there == 1 else 'were'} there"
    part = "" if shard is None else f" of shard {shard}"
    print(f"{summary.folder}: {images}{part}, {there}, {made}.")
