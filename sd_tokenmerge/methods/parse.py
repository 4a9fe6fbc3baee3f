"""Method strings: `name` or `name:option=value,option=value`, parsed strictly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from sd_tokenmerge.methods.base import Method
from sd_tokenmerge.options import describe_type, option_types

_INTEGER = re.compile(r"-?[0-9]+")
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")


def parse_method_string(text: str, methods: Mapping[str, type[Method]]) -> Method:
    """Parse a method string such as `"tome-sd:stride=2,random=true"`.

    No spaces, no abbreviations, each option at most once; booleans are `true` or `false`. Omitted
    options have their defaults.

    Args:
        text: the method string.
        methods: the known methods by name.

    Raises:
        ValueError: unknown method, unknown option or invalid value; the message lists what is
            allowed.
    """
    name, colon, rest = text.partition(":")
    if name not in methods:
        raise ValueError(f"`method` must be one of {', '.join(sorted(methods))}, got {text!r}.")
    types = option_types(methods[name])
    options: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        option, equals, value = part.partition("=")
        if option not in types or not equals:
            raise ValueError(f"`method` {text!r}: {_allowed(name, types)}, got {part!r}.")
        if option in options:
            raise ValueError(f"`method` {text!r}: option {option!r} is given twice.")
        options[option] = _read(text, option, value, types[option])
    return methods[name](**options)


def _allowed(name: str, types: Mapping[str, object]) -> str:
    if not types:
        return f"{name} has no options"
    listed = ", ".join(f"{option}={describe_type(hint)}" for option, hint in types.items())
    return f"the options of {name} are {listed}"


def _read(text: str, option: str, value: str, hint: object) -> bool | int | float | str:
    if hint is bool and value in ("true", "false"):
        return value == "true"
    if hint is int and _INTEGER.fullmatch(value):
        return int(value)
    if hint is float and _NUMBER.fullmatch(value) and math.isfinite(float(value)):
        return float(value)
    if get_origin(hint) is Literal and value in get_args(hint):
        return value
    raise ValueError(f"`method` {text!r}: {option} must be {describe_type(hint)}, got {value!r}.")
