"""The typer application: subcommands are imported only when they are asked for."""

from __future__ import annotations

import os
import re
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from inspect import cleandoc
from io import TextIOWrapper
from typing import Any

import typer
from typer.core import TyperGroup

from sd_tokenmerge.cli.errors import UserError

COMMANDS = (
    *("demo", "bench", "generate", "sweep", "fid", "status", "overlay"),
    *("methods", "sites", "reference", "app"),
)
"""Subcommands: function `<name>_command` in `sd_tokenmerge/cli/<name>.py`.

These modules must not import torch at the top: `--help` imports them all.
"""

_PANELS_FROM_COLUMNS = 120

# Public in typer only through a subclass.
_UsageError: Any = typer.BadParameter.__base__
_ClickException: Any = _UsageError.__base__


class _Subcommands(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        if cmd_name not in self.commands:
            module = import_module(f"sd_tokenmerge.cli.{cmd_name}")
            function = getattr(module, f"{cmd_name}_command")
            single = typer.Typer(
                add_completion=False, pretty_exceptions_enable=False, **_help_style()
            )
            single.command(cmd_name, help=_unwrap(function.__doc__))(function)
            command: Any = typer.main.get_command(single)
            command.callback = _with_user_errors(command.callback, _flags(command))
            self.commands[cmd_name] = command
        return self.commands[cmd_name]


app = typer.Typer(
    cls=_Subcommands,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _help_style() -> dict[str, Any]:
    """Panels in wide terminals only: in a narrow one they cut off names and examples."""
    width = shutil.get_terminal_size().columns
    return {} if width >= _PANELS_FROM_COLUMNS else {"rich_markup_mode": None}


def _with_user_errors(callback: Callable[..., Any], flags: dict[str, str]) -> Callable[..., Any]:
    """Name flags in errors, and keep the message of a `KeyboardInterrupt`, which typer drops."""

    def command(*args: Any, **kwargs: Any) -> Any:
        try:
            return callback(*args, **kwargs)
        except UserError as error:
            error.name_flags(flags | _stand_ins(kwargs))
            raise
        except KeyboardInterrupt as error:
            raise UserError(str(error) or "interrupted.", exit_code=130) from error

    return command


def _flags(command: Any) -> dict[str, str]:
    """The flags of a command by the library's names of the options."""
    options = [parameter for parameter in command.params if parameter.opts[0].startswith("--")]
    spelled = {flag[2:].replace("-", "_"): flag for option in options for flag in option.opts}
    return spelled | {option.name: option.opts[0] for option in options}


def _stand_ins(given: Mapping[str, Any]) -> dict[str, str]:
    """Flags that were given instead of the ones that an error names."""
    is_square = given.get("size") is not None
    return dict.fromkeys(("height", "width"), "--size") if is_square else {}


def _unwrap(text: str) -> str:
    """Join the lines of each paragraph, so that the help wraps at the terminal's width."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", cleandoc(text))


def _show_version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        typer.echo(f"sd-tokenmerge {version('sd-tokenmerge')}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Merge redundant tokens in Stable Diffusion, and measure what it costs."""


def run(arguments: Sequence[str]) -> int:
    """Run one command line, report errors, and return the exit code.

    Characters that a terminal's encoding lacks are printed as "?".
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        return int(
            app(list(arguments) or ["--help"], prog_name="sd-tokenmerge", standalone_mode=False)
            or 0
        )
    except UserError as error:
        if os.environ.get("SD_TOKENMERGE_TRACEBACK"):
            traceback.print_exception(error)
        _report(str(error), own=error.exit_code not in (2, 130))
        return error.exit_code
    except _ClickException as error:
        message = error.format_message().rstrip(".")
        command = error.ctx.command_path if getattr(error, "ctx", None) else "sd-tokenmerge"
        _report(f"{message}. See `{command} --help`.")
        return 2


def _report(message: str, *, own: bool = False) -> None:
    """Print an error once for processes launched together, or once for each if it is its own."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"error: {message}", file=sys.stderr)
    elif own:
        print(f"error: process {rank}: {message}", file=sys.stderr)
