"""Errors that are the user's to solve: one line on stderr, no traceback.

With SD_TOKENMERGE_TRACEBACK=1 in the environment, they show their traceback too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class UserError(Exception):
    """Something the user can put right; the command line prints it as `error: <message>`.

    Attributes:
        exit_code: 2 for bad input, 1 where the surroundings failed (a full disk), 130 for Ctrl-C.
        names_options: whether names in backticks are options as the library calls them.
    """

    def __init__(self, message: str, exit_code: int = 2, *, names_options: bool = False):
        super().__init__(message)
        self.exit_code = exit_code
        self.names_options = names_options

    def name_flags(self, flags: Mapping[str, str]) -> None:
        """Call the options as the user does: `keep_rate` is --keep-rate.

        Args:
            flags: of the command that ran, by the library's name; other names stay.
        """
        if self.names_options:
            said = re.sub(r"`(\w+)`", lambda name: flags.get(name[1], name[0]), str(self))
            self.args = (said,)


@contextmanager
def user_errors(*types: type[Exception]) -> Iterator[None]:
    """Report exceptions of the given types as the user's to solve.

    Wrap the part of a command that reads and checks its input. What is not wrapped keeps its
    traceback, because an unexpected exception is a bug of ours.

    Args:
        types: what to report; default: `ValueError` and `OSError`, the library's own for bad
            values and unusable files.

    Raises:
        UserError: one of `types` was raised inside; its message, on one line.
    """
    reported = types or (ValueError, OSError)
    try:
        yield
    except reported as error:
        is_own = not isinstance(error, OSError)  # else what is in backticks is a file
        raise UserError(describe(error), names_options=is_own) from error


@contextmanager
def memory_errors() -> Iterator[None]:
    """Say what to do where the device's memory does not suffice.

    Raises:
        UserError: that is so.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device's memory does not suffice: use a smaller --batch-size or --offload model. "
            "The same command, so changed, goes on where this one stopped.",
            exit_code=1,
        ) from error


def interruption(error: OSError) -> UserError:
    """What to say where a disk fills up, or fails, amid the work."""
    return UserError(
        f"{describe(error)}. What is there is whole; when this is solved, run the same command "
        f"again.",
        exit_code=1,
    )


def describe(error: Exception) -> str:
    """An exception's message on one line, with the file's name where the system left it out."""
    if isinstance(error, OSError) and error.strerror:
        name = f" `{error.filename}`" if error.filename is not None else ""
        return f"{error.strerror}:{name}" if name else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
