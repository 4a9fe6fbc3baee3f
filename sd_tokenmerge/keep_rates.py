"""How much is kept: the same everywhere, or by denoising step, block or level. Imports no torch.

0.5                         half of the tokens, always
Linear(1.0, 0.4)            everything at first, 40 % at the end of the denoising
During(0.5, stop=0.6)       half of the tokens in the first 60 % of the denoising, else all
Depth(0.7)                  70 % on average over the blocks, less in early ones (ATC, eq. 5)
{0: 0.5, 1: Depth(0.8)}     by level, as `report()` numbers them; no other level is merged

Each has a string, such as "linear:first=1,last=0.4": see `keep_rate_strings`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
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
            progress: how far the denoising is, from 0 (pure noise) to 1 (the image), by the
                timestep: the noise is the same at the same progress, however many steps there are.
            depth: the block's place among the merged blocks, from 0 (the first that runs) to 1.
        """

    @abstractmethod
    def all_at(self, depth: float) -> tuple[float, ...]:
        """Every keep rate that one block can get, in the order of the denoising."""

    def __str__(self) -> str:
        """The string that `keep_rate_strings.parse_keep_rate` reads back."""
        options = (f"{f.name}={_number_text(getattr(self, f.name))}" for f in fields(self))  # type: ignore[arg-type]
        return f"{self.name}:{','.join(options)}"


@dataclass(frozen=True)
class Constant(KeepRate):
    """The same in every step and block (ATC, eq. 4).

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
    """From one keep rate to another over the denoising, in equal stages.

    In stages, because each rate has tensors of its own shape: a compiled model is recompiled once
    for each, and no partition is reused from one to the next.

    Attributes:
        first: of the first stage, in (0, 1].
        last: of the last stage, in (0, 1].
        stages: how many, 2 to `MAX_STAGES`.
    """

    name: ClassVar[str] = "linear"
    varies_over_steps: ClassVar[bool] = True
    first: float
    last: float
    stages: int = 5

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        _require_rate("first", self.first)
        _require_rate("last", self.last)
        if type(self.stages) is not int:
            raise TypeError(f"`stages` must be an integer, got {self.stages!r}.")
        if not 2 <= self.stages <= MAX_STAGES:
            raise ValueError(f"`stages` must be in [2, {MAX_STAGES}], got {self.stages}.")

    def at(self, progress: float, depth: float) -> float:
        """The rate of the stage that `progress` is in."""
        stage = min(max(int(progress * self.stages), 0), self.stages - 1)
        return self.all_at(depth)[stage]

    def all_at(self, depth: float) -> tuple[float, ...]:
        """One for each stage."""
        step = (self.last - self.first) / (self.stages - 1)
        # rounded, so that 0.7 on the way from 1 to 0.4 is the 0.7 that a user would write
        return tuple(round(self.first + step * stage, 9) for stage in range(self.stages))


@dataclass(frozen=True)
class During(KeepRate):
    """One keep rate in a part of the denoising, and everything in the rest.

    Attributes:
        rate: in (0, 1].
        start: progress at which merging begins, in [0, 1).
        stop: progress at which it ends, in (start, 1].
    """

    name: ClassVar[str] = "during"
    varies_over_steps: ClassVar[bool] = True
    rate: float
    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        _require_rate("rate", self.rate)
        for name in ("start", "stop"):
            require_number(name, getattr(self, name))
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
        """`rate`, with 1 before and after it where there is such a part."""
        before, after = (1.0,) * (self.start > 0), (1.0,) * (self.stop < 1)
        return (*before, self.rate, *after)


@dataclass(frozen=True)
class Depth(KeepRate):
    """Merges much in the first block and nothing in the last (ATC, eq. 5).

    ATC's blocks remove tokens for good; here each block merges anew, so what decreases is the
    fraction that a block removes. Where blocks are compiled one by one, each of them gets a graph
    of its own, and `torch.compile` by default makes 8: compile the whole UNet of a model with more
    merged blocks (SDXL has 10).

    Attributes:
        rate: average over the blocks, in (0.5, 1]: the first removes twice as much as the average.
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
        """One."""
        return (self.at(0.0, depth),)


def _number_text(value: float) -> str:
    """The shortest decimal that is read back as the same number, never as 1e-05."""
    text = format(Decimal(repr(float(value))), "f")
    return text.removesuffix(".0")


def require_number(name: str, value: object) -> None:
    """Raise TypeError for what is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")


def _require_rate(name: str, value: float) -> None:
    require_number(name, value)
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must be in (0, 1], got {value}.")
