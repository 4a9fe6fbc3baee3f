"""`sd-tokenmerge demo`: see merging at work in the embedded sample pipeline."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from sd_tokenmerge.cli.errors import generation_errors, interruption, user_errors
from sd_tokenmerge.cli.generate import Overwrite


def demo_command(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo"),
    show: Annotated[
        bool, typer.Option("--open/--no-open", help="Open the contact sheet if there is a display.")
    ] = True,
    overwrite: Overwrite = False,
) -> None:
    """Generate the same pictures unmerged, with each preset, and with fewer steps.

    Uses the embedded sample pipeline; needs neither a network nor a GPU. Writes the pictures, a
    contact sheet, a table of PSNR and time, and drawings of the clusters. May be stopped at any
    moment; the same command resumes.
    """
    from sd_tokenmerge.cli.progress import ConsoleProgress
    from sd_tokenmerge.cli.quiet import quiet_libraries

    quiet_libraries()

    from sd_tokenmerge.cli.columns import in_columns
    from sd_tokenmerge.demo import run_demo, table

    try:
        with generation_errors(), user_errors(ValueError):
            result = run_demo(out, ConsoleProgress, overwrite=overwrite)
    except OSError as error:
        raise interruption(error) from error
    print(in_columns(table(result.rows)))
    print(
        "\nMerging saves time only where self-attention over many tokens takes much of it, as in "
        "large pictures;\nthese have 1,024 tokens.\n"
    )
    print("\n".join(map(str, result.files)))
    if show and sys.stdout.isatty() and _has_display():
        typer.launch(str(result.files[0]))


def _has_display() -> bool:
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
