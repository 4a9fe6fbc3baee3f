"""Keep rates from numbers and strings, and back. Imports no torch.

"0.5", "50%"                   half of the tokens
"linear:first=1,last=0.4"      a `KeepRate` by its name, with its options
"0=0.5,1=depth:rate=0.8"       one for each level
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields

from sd_tokenmerge.keep_rates import Constant, Depth, During, KeepRate, Linear, require_number

KEEP_RATES: dict[str, type[KeepRate]] = {kind.name: kind for kind in (Linear, During, Depth)}

KeepRateLike = float | str | KeepRate
"""What `parse_keep_rate` takes."""

_OPTION = re.compile(r"(\w+)=(\d+(?:\.\d+)?)")
_LEVEL = re.compile(r"\d+=")


def parse_keep_rate(value: KeepRateLike) -> KeepRate:
    """A keep rate from a number or a string such as `"linear:first=1,last=0.4"`.

    Raises:
        TypeError: `value` is neither, nor a `KeepRate`.
        ValueError: a number outside (0, 1], an unknown string, or an option out of range.
    """
    if isinstance(value, KeepRate):
        return value
    if not isinstance(value, str):
        require_number("keep_rate", value)
        return Constant(value)
    if number := re.fullmatch(r"(\d*\.?\d+)(%?)", value):
        return Constant(float(number[1]) / (100 if number[2] else 1))
    kind, _, rest = value.partition(":")
    options = [_OPTION.fullmatch(part) for part in rest.split(",")]
    if kind not in KEEP_RATES or None in options:
        raise ValueError(
            f"`keep_rate` must be a number in (0, 1], {_known()}, or one of these for each level, "
            f"such as 0=0.5,1=0.8; got {value!r}."
        )
    pairs = [(match[1], match[2]) for match in options if match is not None]
    types = {f.name: int if f.type == "int" else float for f in fields(KEEP_RATES[kind])}  # type: ignore[arg-type]
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names) or not set(names) <= set(types):
        raise ValueError(f"`keep_rate` {value!r}: must be like {_known()}, each option once.")
    for name, text in pairs:
        if types[name] is int and not text.isdigit():
            raise ValueError(f"`keep_rate` {value!r}: {name} must be an integer, got {text!r}.")
    try:
        return KEEP_RATES[kind](**{name: types[name](text) for name, text in pairs})
    except TypeError:  # an option without a default is missing
        raise ValueError(f"`keep_rate` {value!r}: must be like {_known()}.") from None


def parse_levels(value: Mapping[int, KeepRateLike]) -> dict[int, KeepRate]:
    """Keep rates by level, finest first.

    Raises:
        TypeError: a level is no integer, or a keep rate is of the wrong type.
        ValueError: there is none, a level is negative, or a keep rate is out of range.
    """
    if not value:
        raise ValueError("`keep_rate` must name at least one level, got none.")
    for level in value:
        if type(level) is not int:
            raise TypeError(f"`keep_rate` must have integers as levels, got {level!r}.")
        if level < 0:
            raise ValueError(f"`keep_rate` must have levels of at least 0, got {level}.")
    return {level: parse_keep_rate(value[level]) for level in sorted(value)}


def parse_keep_rates(
    value: KeepRateLike | Mapping[int, KeepRateLike],
) -> KeepRate | dict[int, KeepRate]:
    """A keep rate, or one for each level, from whatever `apply_patch` takes.

    Args:
        value: as for `parse_keep_rate` or `parse_levels`, or a string with the keep rate of each
            level, such as `"0=0.5,1=depth:rate=0.8"`.

    Raises:
        TypeError: `value` is of another type.
        ValueError: a keep rate is unknown or out of range, or a level is named twice.
    """
    if isinstance(value, Mapping):
        return parse_levels(value)
    if not isinstance(value, str) or _LEVEL.match(value) is None:
        return parse_keep_rate(value)
    # A comma also separates the options of one keep rate, but none of them is named by a number.
    pairs = [part.split("=", 1) for part in re.split(r",(?=\d+=)", value)]
    by_level = {int(level): rate for level, rate in pairs}
    if len(by_level) < len(pairs):
        raise ValueError(f"`keep_rate` must name each level once, got {value!r}.")
    return parse_levels(by_level)


def format_keep_rates(value: KeepRate | Mapping[int, KeepRate]) -> str:
    """The string that `parse_keep_rates` reads back."""
    if isinstance(value, KeepRate):
        return str(value)
    return ",".join(f"{level}={rate}" for level, rate in value.items())


def _known() -> str:
    return "linear:first=1,last=0.4,stages=5, during:rate=0.5,start=0,stop=0.6 or depth:rate=0.7"
