"""Options declared once, as dataclass fields: type, default, range and help. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def option(
    help: str,
    *,
    default: Any = MISSING,
    at_least: float | None = None,
    below: float | None = None,
    **metadata: Any,
) -> Any:
    """A dataclass field that is an option.

    Args:
        help: one sentence for the command line and the documentation.
        default: its default; without one, the option is required.
        at_least: smallest allowed number.
        below: numbers must be smaller than this.
        metadata: further metadata of the field, such as `flag`.
    """
    limits = {"help": help, "at_least": at_least, "below": below}
    return field(default=default, metadata=limits | metadata)


@cache
def option_types(owner: type) -> dict[str, object]:
    """The options of a dataclass and their types, in the order of its fields."""
    hints = get_type_hints(owner)
    return {entry.name: hints[entry.name] for entry in fields(owner)}


def describe_type(hint: object) -> str:
    """The name of a type's values in error messages.

    Raises:
        TypeError: options can't have this type.
    """
    if get_origin(hint) is Literal:
        return "|".join(get_args(hint))
    known = {bool: "true|false", int: "an integer", float: "a number", str: "text"}
    if hint in known:
        return known[hint]
    raise TypeError(f"an option must be bool, int, float, str or a Literal, got {hint}.")


def without_none(hint: object) -> object:
    """`T` for `T | None`; any other type unchanged."""
    if get_origin(hint) in (Union, UnionType):
        rest = [part for part in get_args(hint) if part is not NoneType]
        return rest[0] if len(rest) == 1 else hint
    return hint


def require_option(owner: type, name: str, value: object, *, label: str | None = None) -> None:
    """Refuse a value of the wrong type or out of range for an option of `owner`.

    None is accepted where the type includes it. Types that `describe_type` does not know are left
    to the dataclass.

    Args:
        owner: the dataclass.
        name: the option.
        value: its value.
        label: what the error calls the option; default: the name in backticks.

    Raises:
        TypeError: the value is of the wrong type.
        ValueError: it is not one of the choices, or out of range.
    """
    entry = next(entry for entry in fields(owner) if entry.name == name)
    full_hint = option_types(owner)[name]
    label = f"`{name}`" if label is None else label
    hint = without_none(full_hint)
    if value is None and hint is not full_hint:
        return
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(get_args(hint))
            raise ValueError(f"{label} must be one of {choices}, got {value!r}.")
        return
    if hint not in (bool, int, float, str):
        return
    if type(value) is not hint and not (hint is float and type(value) is int):
        raise TypeError(f"{label} must be {_with_article(hint)}, got {value!r}.")
    low, end = entry.metadata.get("at_least"), entry.metadata.get("below")
    if low is not None and end is not None and not low <= value < end:
        raise ValueError(f"{label} must be in [{low}, {_power_text(end)}), got {value}.")
    if low is not None and value < low:
        raise ValueError(f"{label} must be at least {low}, got {value}.")


def require_options(instance: object) -> None:
    """Check every option of a dataclass instance with `require_option`.

    Raises:
        TypeError: a value is of the wrong type.
        ValueError: a value is out of range.
    """
    owner: type = type(instance)
    for name in option_types(owner):
        require_option(owner, name, getattr(instance, name))


def _with_article(hint: object) -> str:
    return "True or False" if hint is bool else describe_type(hint)


def _power_text(limit: float) -> str:
    power = int(limit).bit_length() - 1
    return f"2^{power}" if limit == 2**power and power > 20 else f"{limit}"
