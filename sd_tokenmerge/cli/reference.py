"""`sd-tokenmerge reference`: ATC's reference set from the ImageNet validation set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sd_tokenmerge.cli.errors import user_errors
from sd_tokenmerge.cli.progress import ConsoleProgress


def reference_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of the ImageNet validation set, in any layout; images are found by name."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder for the 5,000 images.")],
    link: Annotated[
        bool, typer.Option("--link", help="Make symbolic links instead of copies.")
    ] = False,
) -> None:
    """Collect the first five ImageNet validation images of each class, ATC's reference set.

    A missing or damaged image is an error. A folder that holds the set already is verified.
    """
    bar = ConsoleProgress("Copying")

    def advance(done: int, total: int) -> None:
        if done == 1:
            bar.start(total, 0)
        bar.update(done)

    try:
        with user_errors():
            from sd_tokenmerge.fid.reference import make_reference

            result = make_reference(source, out, link=link, progress=advance)
    finally:
        bar.stop()
    how = "verified, was there already" if result.reused else f"from {source}"
    print(f"{result.folder}: {len(result.images)} images of 1000 classes, {how}")
