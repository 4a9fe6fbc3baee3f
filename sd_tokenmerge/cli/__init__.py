"""The `sd-tokenmerge` command: one file per subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 for success, 2 for bad input, 1 for other failures.

    Args:
        arguments: words after the command's name; default: those of this process.
    """
    from sd_tokenmerge.cli.commands import run
    from sd_tokenmerge.cli.threads import wait_passively

    wait_passively()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))
