"""Interleaved timing: contestants take turns, each compared with a reference timed next to it.

A machine's speed drifts over minutes. So a reference is timed before and after every few turns, and
each turn is compared with the mean of these two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import torch


class Cost(NamedTuple):
    """Wall-clock seconds, and CPU seconds of all threads of the process."""

    wall: float
    cpu: float


def clock() -> Cost:
    """Both clocks now, after waiting for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Cost(time.perf_counter(), time.process_time())


def elapsed(start: Cost) -> Cost:
    """Cost since `start`."""
    end = clock()
    return Cost(end.wall - start.wall, end.cpu - start.cpu)


def timed(run: Callable[[], object]) -> Cost:
    """Cost of one call."""
    start = clock()
    run()
    return elapsed(start)


@dataclass
class Timings:
    """The turns of one contestant.

    Attributes:
        costs: of each turn.
        reference: of the reference around each turn (mean of before and after).
    """

    costs: list[Cost] = field(default_factory=list)
    reference: list[Cost] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Wall-clock seconds of each turn."""
        return [cost.wall for cost in self.costs]

    @property
    def relative(self) -> list[float]:
        """Wall-clock time of each turn, divided by that of the reference around it."""
        return [a.wall / b.wall for a, b in zip(self.costs, self.reference, strict=True)]

    @property
    def relative_cpu(self) -> list[float]:
        """The same ratio of CPU times."""
        return [a.cpu / b.cpu for a, b in zip(self.costs, self.reference, strict=True)]


def take_turns(
    reference: tuple[str, Callable[[], Cost]],
    others: Mapping[str, Callable[[], Cost]],
    *,
    seconds: float,
    rounds: int,
    least: int = 1,
    between: int = 3,
) -> dict[str, Timings]:
    """Time a reference and others in rounds, each round in another order.

    Args:
        reference: name and run that the others are compared with.
        others: runs by name.
        seconds: after `least` rounds, no round begins that would probably end later than this.
        rounds: maximum number of rounds.
        least: minimum number of rounds.
        between: turns between two runs of the reference.

    Returns:
        Timings by name, the reference first.
    """
    name, run_reference = reference
    timings = {name: Timings()} | {other: Timings() for other in others}

    def time_reference() -> Cost:
        cost = run_reference()
        timings[name].costs.append(cost)
        timings[name].reference.append(cost)
        return cost

    run_reference()  # a warm-up
    started = time.perf_counter()
    before = time_reference()
    for number in range(rounds):
        order = rotated(list(others), number)
        for first in range(0, len(order), between):
            group = order[first : first + between]
            costs = [others[other]() for other in group]
            after = time_reference()
            neighbours = Cost((before.wall + after.wall) / 2, (before.cpu + after.cpu) / 2)
            for other, cost in zip(group, costs, strict=True):
                timings[other].costs.append(cost)
                timings[other].reference.append(neighbours)
            before = after
        spent = time.perf_counter() - started
        if number + 1 >= least and spent * (number + 1.9) / (number + 1) > seconds:
            break
    return timings


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: rotated by three places each time, every other one reversed."""
    start = number * 3 % max(len(names), 1)
    order = [*names[start:], *names[:start]]
    return order if number % 2 == 0 else order[::-1]


def percentile(values: Sequence[float], fraction: float) -> float:
    """The value nearest to a percentile, without interpolation."""
    return sorted(values)[round(fraction * (len(values) - 1))]


def spread_columns(prefix: str, seconds: Sequence[float]) -> dict[str, str]:
    """Median, 20th and 80th percentile in milliseconds, as columns `PREFIX`, `PREFIX_20`, ..."""
    return {
        prefix: milliseconds(median(seconds)),
        f"{prefix}_20": milliseconds(percentile(seconds, 0.2)),
        f"{prefix}_80": milliseconds(percentile(seconds, 0.8)),
    }


def milliseconds(seconds: float) -> str:
    """Milliseconds, with a decimal below one second."""
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.1f}"
