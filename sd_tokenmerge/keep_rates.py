"""The fraction of tokens to keep: constant, or by denoising step, block or level. No torch.

object                      string                          keeps
0.5                         "0.5", "50%"                    half of the tokens
Linear(1.0, 0.4)            "linear:first=1,last=0.4"       all at first, 40 % in the last steps
During(0.5, stop=0.6)       "during:rate=0.5,stop=0.6"      half in the first 60 % of the steps
Depth(0.7)                  "depth:rate=0.7"                70 % on average over the blocks
{0: 0.5, 1: Depth(0.8)}     "0=0.5,1=depth:rate=0.8"        by level; no other level is merged
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import ClassVar

MAX_STAGES = 8
"""`torch.compile` by default compiles a function for at most this many shapes."""


class KeepRate(ABC):
    """The fraction of the tokens that a block keeps; subclasses are frozen dataclasses."""

    name: ClassVar[str]
    varies_over_steps: ClassVar[bool] = False
    varies_over_blocks: ClassVar[bool] = False

    @abstractmethod
    def at(self, progress: float, depth: float) -> float:
        """The keep rate of one block in one step, in (0, 1].

        Args:
            progress: the step's place among the scheduler's timesteps: index / number of timesteps,
                in [0, 1).
            depth: the block's place among the merged blocks, from 0 (the first that runs) to 1.
        """

    @abstractmethod
    def all_at(self, depth: float) -> tuple[float, ...]:
        """Every keep rate that one block can get, in the order of the denoising."""

    def __str__(self) -> str:
        """The string that `parse_keep_rate` reads back."""
        options = (f"{f.name}={_number_text(getattr(self, f.name))}" for f in fields(self))  # type: ignore[arg-type]
        return f"{self.name}:{','.join(options)}"


@dataclass(frozen=True)
class Constant(KeepRate):
    """The same keep rate in every step and block (ATC, eq. 4).

    Attributes:
        rate: in (0, 1].
    """

    name: ClassVar[str] = "constant"
    rate: float

    def __post_init__(self) -> None:
        """Refuse a rate outside (0, 1]."""
        _require_rate("keep_rate", self.rate)

    def at(self, progress: float, depth: float) -> float:
        """`rate`."""
        return self.rate

    def all_at(self, depth: float) -> tuple[float, ...]:
        """`rate` alone."""
        return (self.rate,)

    def __str__(self) -> str:
        """The number."""
        return _number_text(self.rate)


@dataclass(frozen=True)
class Linear(KeepRate):
    """Changes from one keep rate to another over the denoising steps, in equal stages.

    Each keep rate has its own tensor shapes, so a compiled model is recompiled once per stage, and
    no partition is reused across stages.

    Attributes:
        first: keep rate of the first stage, in (0, 1].
        last: keep rate of the last stage, in (0, 1].
        stages: number of stages, 2 to `MAX_STAGES`.
    """

    name: ClassVar[str] = "linear"
    varies_over_steps: ClassVar[bool] = True
    first: float
    last: float
    stages: int = 5

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _require_rate("first", self.first)
        _require_rate("last", self.last)
        if type(self.stages) is not int:
            raise TypeError(f"`stages` must be an integer, got {self.stages!r}.")
        if not 2 <= self.stages <= MAX_STAGES:
            raise ValueError(f"`stages` must be in [2, {MAX_STAGES}], got {self.stages}.")

    def at(self, progress: float, depth: float) -> float:
        """The keep rate of the stage that contains `progress`."""
        stage = min(max(int(progress * self.stages), 0), self.stages - 1)
        return self.all_at(depth)[stage]

    def all_at(self, depth: float) -> tuple[float, ...]:
        """The keep rate of each stage."""
        step = (self.last - self.first) / (self.stages - 1)
        # rounded, so that the middle of 1 and 0.4 is exactly the 0.7 that a user would write
        return tuple(round(self.first + step * stage, 9) for stage in range(self.stages))


@dataclass(frozen=True)
class During(KeepRate):
    """Merges during one part of the denoising, and keeps every token in the rest.

    Attributes:
        rate: keep rate of that part, in (0, 1].
        start: progress at which merging starts, in [0, 1).
        stop: progress at which merging stops, in (start, 1].
    """

    name: ClassVar[str] = "during"
    varies_over_steps: ClassVar[bool] = True
    rate: float
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _require_rate("rate", self.rate)
        for name in ("start", "stop"):
            _require_number(name, getattr(self, name))
        if not 0 <= self.start < self.stop <= 1:
            raise ValueError(
                f"`start` and `stop` must satisfy 0 <= start < stop <= 1, "
                f"got {self.start} and {self.stop}."
            )

    def at(self, progress: float, depth: float) -> float:
        """`rate` between `start` and `stop`, else 1."""
        is_over = progress >= self.stop and self.stop < 1
        return 1.0 if progress < self.start or is_over else self.rate

    def all_at(self, depth: float) -> tuple[float, ...]:
        """`rate`, preceded and followed by 1 where merging starts later or stops earlier."""
        before, after = (1.0,) * (self.start > 0), (1.0,) * (self.stop < 1)
        return (*before, self.rate, *after)


@dataclass(frozen=True)
class Depth(KeepRate):
    """Merges most in the first block and nothing in the last (ATC, eq. 5).

    ATC's blocks remove tokens permanently; here each block merges anew, so the fraction that a
    block removes decreases with depth. If blocks are compiled one by one, each gets its own graph,
    and `torch.compile` makes at most 8 by default: compile the whole UNet of models with more
    merged blocks (SDXL has 10).

    Attributes:
        rate: average keep rate of the blocks, in (0.5, 1]; the first block removes twice the
            average.
    """

    name: ClassVar[str] = "depth"
    varies_over_blocks: ClassVar[bool] = True
    rate: float

    def __post_init__(self) -> None:
        """Refuse a rate at which the first block would keep nothing."""
        _require_rate("rate", self.rate)
        if self.rate <= 0.5:
            raise ValueError(
                f"`rate` of depth must be in (0.5, 1], got {self.rate}: the first block removes "
                f"twice as much as the average."
            )

    def at(self, progress: float, depth: float) -> float:
        """`1 - (2 t - 2 t l / (L - 1))`, with `t = 1 - rate` and `depth = l / (L - 1)`."""
        # eq. (5)
        return round(1 - 2 * (1 - self.rate) * (1 - depth), 9)

    def all_at(self, depth: float) -> tuple[float, ...]:
        """The block's single keep rate."""
        return (self.at(0.0, depth),)


def _number_text(value: float) -> str:
    """The shortest decimal that is read back as the same number, never as 1e-05."""
    text = format(Decimal(repr(float(value))), "f")
    return text.removesuffix(".0")


def _require_number(name: str, value: object) -> None:
    """Raise TypeError unless `value` is a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")


def _require_rate(name: str, value: float) -> None:
    _require_number(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must be in (0, 1], got {value}.")


KEEP_RATES: dict[str, type[KeepRate]] = {kind.name: kind for kind in (Linear, During, Depth)}

KeepRateLike = float | str | KeepRate
"""The types that `parse_keep_rate` accepts."""

_OPTION = re.compile(r"(\w+)=(\d+(?:\.\d+)?)")
_LEVEL = re.compile(r"\d+=")


def parse_keep_rate(value: KeepRateLike) -> KeepRate:
    """Read a keep rate from a number or a string such as `"linear:first=1,last=0.4"`.

    Raises:
        TypeError: `value` is neither a number, a string nor a `KeepRate`.
        ValueError: a number outside (0, 1], an unknown string, or an option out of range.
    """
    if isinstance(value, KeepRate):
        return value
    if not isinstance(value, str):
        _require_number("keep_rate", value)
        return Constant(value)
    if number := re.fullmatch(r"(\d*\.?\d+)(%?)", value):
        return Constant(float(number[1]) / (100 if number[2] else 1))
    kind, _, rest = value.partition(":")
    options = [_OPTION.fullmatch(part) for part in rest.split(",")]
    if kind not in KEEP_RATES or None in options:
        raise ValueError(
            f"`keep_rate` must be a number in (0, 1], {_known()}, or a keep rate for each level, "
            f"such as 0=0.5,1=0.8; got {value!r}."
        )
    pairs = [(match[1], match[2]) for match in options if match is not None]
    types = {f.name: int if f.type == "int" else float for f in fields(KEEP_RATES[kind])}  # type: ignore[arg-type]
    names = [name for name, _ in pairs]
    if len(set(names)) < len(names) or not set(names) <= set(types):
        raise ValueError(
            f"`keep_rate` {value!r}: must have the form {_known()}, with each option once."
        )
    for name, text in pairs:
        if types[name] is int and not text.isdigit():
            raise ValueError(f"`keep_rate` {value!r}: {name} must be an integer, got {text!r}.")
    try:
        return KEEP_RATES[kind](**{name: types[name](text) for name, text in pairs})
    except TypeError:  # an option without a default is missing
        raise ValueError(f"`keep_rate` {value!r}: must have the form {_known()}.") from None


def parse_levels(value: Mapping[int, KeepRateLike]) -> dict[int, KeepRate]:
    """Read the keep rates of levels; the result starts with the finest level.

    Raises:
        TypeError: a level is not an integer, or a keep rate is of the wrong type.
        ValueError: `value` is empty, a level is negative, or a keep rate is out of range.
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
    """Read a keep rate, or one per level, in any form that `MergeConfig` accepts.

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
    # A comma also separates the options of one keep rate, but no option's name is a number.
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
