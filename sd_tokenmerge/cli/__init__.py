"""The `sd-tokenmerge` command: one file per subcommand."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 bad input, 1 anything unexpected.

    Args:
        arguments: what follows the command's name; default: those of this process.
    """
    from sd_tokenmerge.cli.app import run

    sys.exit(run(sys.argv[1:] if arguments is None else arguments))
