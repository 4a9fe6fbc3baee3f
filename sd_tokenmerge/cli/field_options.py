"""Command line parameters made from the fields of option dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from sd_tokenmerge.options import option_types, without_none

Command = Callable[..., None]

_DEFAULT_PANEL = "Merging"
"""Help section of fields without a `panel`, those of `MergeConfig`."""


def with_options(
    *owners: type, only: Collection[str] | None = None, without: Collection[str] = ()
) -> Callable[[Command], Command]:
    """Replace a command's `**values` by one parameter for each field that is an `option`.

    The help lists required options first, then the command's own, then those of the fields.

    An option that is not given is passed as None; `given_values` collects the others.

    Args:
        owners: dataclasses.
        only: parameters to take; default: all.
        without: parameters to leave out.
    """

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        parameters = [p for p in own if p.kind is not p.VAR_KEYWORD]
        for owner in owners:
            types = option_types(owner)
            parameters += [
                _parameter(entry, types[entry.name])
                for entry in _options(owner)
                if (only is None or parameter_name(entry) in only)
                and parameter_name(entry) not in without
            ]
        parameters.sort(key=lambda parameter: parameter.default is not parameter.empty)
        keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        command.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in keyword_only}
        return command

    return decorate


def given_values(owner: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a dataclass that were given on the command line, by field.

    Args:
        owner: the dataclass.
        values: the command's parameters; those of other dataclasses are ignored.

    Raises:
        ValueError: a text cannot be parsed.
    """
    found = {}
    for entry in _options(owner):
        value = values.get(parameter_name(entry))
        if value is not None and value != []:
            parse = entry.metadata.get("parse", tuple if isinstance(value, list) else None)
            found[entry.name] = value if parse is None else parse(value)
    return found


def flags_of(owner: type) -> dict[str, str]:
    """The flag of each option of a dataclass, by field."""
    return {entry.name: _flag(entry) for entry in _options(owner)}


def parameter_name(entry: Field[Any]) -> str:
    """The parameter of a field: its flag as an identifier."""
    return _flag(entry).removeprefix("--").replace("-", "_")


def _options(owner: type) -> Iterator[Field[Any]]:
    return (entry for entry in fields(owner) if "help" in entry.metadata)


def _flag(entry: Field[Any]) -> str:
    return str(entry.metadata.get("flag", f"--{entry.name.replace('_', '-')}"))


def _parameter(entry: Field[Any], hint: object) -> inspect.Parameter:
    kind = without_none(hint)
    flag = _flag(entry)
    if kind is bool:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    elif get_origin(kind) is tuple and "parse" not in entry.metadata:
        kind = list[str]
    elif kind not in (int, float):
        kind = str
    is_required = entry.default is MISSING
    annotation: Any = Annotated[
        kind if is_required else kind | None,
        typer.Option(
            flag,
            help=_help(entry, hint),
            rich_help_panel=entry.metadata.get("panel", _DEFAULT_PANEL),
        ),
    ]
    default = inspect.Parameter.empty if is_required else None
    return inspect.Parameter(
        parameter_name(entry),
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=annotation,
    )


def _help(entry: Field[Any], hint: object) -> str:
    """The field's help, its choices and its default."""
    parts = [entry.metadata["help"]]
    if get_origin(without_none(hint)) is Literal:
        parts.append(f"One of {', '.join(get_args(without_none(hint)))}.")
    default = entry.default
    if default is None:
        default = entry.metadata.get("when_none")
    elif isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, str) and " " in default:
        default = f'"{default}"'
    if default not in (None, MISSING, ()):
        parts.append(f"Default: {default}.")
    return " ".join(parts)
