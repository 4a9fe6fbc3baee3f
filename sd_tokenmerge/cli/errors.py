"""Errors that the user can solve: one line on stderr, no traceback.

With SD_TOKENMERGE_TRACEBACK=1 in the environment, they show their traceback as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import typer

from sd_tokenmerge.files import describe_error


class UserError(Exception):
    """An error that the user can solve; the command line prints it as `error: <message>`.

    Attributes:
        exit_code: 2 for bad input, 1 for a failure while working (a full disk), 130 for Ctrl-C.
        names_options: whether names in backticks are the library's names of options.
    """

    def __init__(self, message: str, exit_code: int = 2, *, names_options: bool = False):
        super().__init__(message)
        self.exit_code = exit_code
        self.names_options = names_options

    def name_flags(self, flags: Mapping[str, str]) -> None:
        """Replace the library's names of options by flags: `keep_rate` by --keep-rate.

        Args:
            flags: the flags of the command that ran, by the library's name; other names stay.
        """
        if self.names_options:
            self.args = (re.sub(r"`(\w+)`", lambda name: flags.get(name[1], name[0]), str(self)),)


@contextmanager
def user_errors(*types: type[Exception], flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Report exceptions of the given types as errors that the user can solve.

    Wrap the part of a command that reads and checks its input. Other exceptions keep their
    traceback, because an unexpected exception is a bug of this package.

    Args:
        types: the exceptions to report; default: `ValueError` and `OSError`, which the library
            raises for bad values and unusable files.
        flags: flags by the library's names, where they differ from the command's.

    Raises:
        UserError: one of `types` was raised inside; its message, on one line.
    """
    reported = types or (ValueError, OSError)
    try:
        yield
    except reported as error:
        names_options = not isinstance(error, OSError)  # otherwise backticks hold a file's name
        new = UserError(describe_error(error), names_options=names_options)
        new.name_flags(flags or {})
        raise new from error


@contextmanager
def generation_errors() -> Iterator[None]:
    """Report lack of memory and NaN pixels, which appear only while images are generated.

    Raises:
        UserError: one of them happened; exit code 1.
    """
    from sd_tokenmerge.devices import is_out_of_memory
    from sd_tokenmerge.processes import is_first_process
    from sd_tokenmerge.sampling.run import NotANumberError

    try:
        yield
    except NotANumberError as error:
        if not is_first_process():
            raise typer.Exit(1) from error
        raise UserError(
            f"{error}. All other images are done. Half precision is a common cause: try --dtype "
            "bfloat16 or float32 in another --out.",
            exit_code=1,
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            "the device has too little memory: use a smaller --batch-size or --offload model. "
            "With such a change, the same command resumes where this one stopped.",
            exit_code=1,
        ) from error


def interruption(error: OSError) -> UserError:
    """The error for a disk that fills up, or fails, during the work."""
    return UserError(
        f"{describe_error(error)}. The stored images are intact; once this is solved, run the same "
        f"command again.",
        exit_code=1,
    )
