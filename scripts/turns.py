"""Calls of a UNet by turns, related to those of the unpatched UNet at that time.

A machine is not equally fast for minutes on end. So a call of the unpatched UNet is timed before
and after every few turns, and what happens in between is compared with the mean of these two.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from attention_calls import AttentionCalls
from pipeline_contestants import Contestant, rotated
from timed_unet import TimedUNet

UNPATCHED = "unpatched"
TURNS_BETWEEN = 3
"""Turns from one call of the unpatched UNet to the next."""


@dataclass
class Timings:
    """One contestant's turns, in seconds.

    Attributes:
        refresh_every: steps for which it uses a partition.
        fresh: calls with a new partition.
        kept: calls with a kept one; none where partitions are used for one step.
        unpatched: a call of the unpatched UNet at that time.
    """

    refresh_every: int = 1
    fresh: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    unpatched: list[float] = field(default_factory=list)

    def steps(self) -> list[float]:
        """Per step, over a partition's life."""
        if self.refresh_every == 1:
            return self.fresh
        pairs = zip(self.fresh, self.kept, strict=True)
        return [(a + (self.refresh_every - 1) * b) / self.refresh_every for a, b in pairs]

    def relative(self) -> list[float]:
        """Steps in calls of the unpatched UNet."""
        return [a / b for a, b in zip(self.steps(), self.unpatched, strict=True)]


def take_turns(
    calls: TimedUNet | AttentionCalls,
    contestants: Sequence[Contestant],
    seconds: float,
    rounds: int,
) -> dict[str, Timings]:
    """Time contestants in rounds, each in another order.

    Args:
        calls: of the UNet, or of its self-attentions.
        contestants: what takes turns; the unpatched UNet does anyway.
        seconds: no further round is begun that would end later; the first one always is.
        rounds: at most so many.

    Returns:
        By name, the unpatched UNet first.
    """
    others = [one for one in contestants if one.name != UNPATCHED]
    unpatched = Timings()
    timings = {UNPATCHED: unpatched} | {one.name: Timings(one.refresh_every) for one in others}
    steps = calls.timesteps()
    started = time.perf_counter()
    print(f"warm-up: {calls.timed(steps[0]):.2f} s", file=sys.stderr)
    before = calls.timed(steps[10])
    unpatched.fresh.append(before)
    for number in range(rounds):
        begun = time.perf_counter()
        order = [one for one in rotated(others, number) if number < (one.rounds or rounds)]
        for first in range(0, len(order), TURNS_BETWEEN):
            group = order[first : first + TURNS_BETWEEN]
            for one in group:
                _take_turn(calls, one, timings[one.name])
            after = calls.timed(steps[10])
            unpatched.fresh.append(after)
            for one in group:
                timings[one.name].unpatched.append((before + after) / 2)
            before = after
        now = time.perf_counter()
        print(f"round {number + 1} took {now - begun:.0f} s", file=sys.stderr)
        if now - started + 0.9 * (now - begun) > seconds:
            break
    unpatched.unpatched = unpatched.fresh
    return timings


def _take_turn(calls: TimedUNet | AttentionCalls, one: Contestant, timings: Timings) -> None:
    steps = calls.timesteps()
    with one.on(calls.unet):
        timings.fresh.append(calls.timed(steps[10]))
        if one.refresh_every > 1:
            timings.kept.append(calls.timed(steps[11]))
