"""Interleaved turns, and the reference that they are compared with."""

from __future__ import annotations

import pytest

from sd_tokenmerge.bench.turns import (
    Cost,
    Timings,
    percentile,
    rotated,
    spread_columns,
    take_turns,
    timed,
)


@pytest.fixture
def run():
    """The n-th run takes n seconds."""
    clock = iter(range(1, 1000))
    return lambda: Cost(float(next(clock)), 0.0)


def test_a_reference_is_timed_before_and_after_every_few_turns(run):
    names = ["one", "two", "three", "last"]
    timings = take_turns(("base", run), dict.fromkeys(names, run), seconds=0, rounds=10)
    assert timings["base"].seconds == [2, 6, 8]  # the first run is a warm-up
    assert timings["one"].costs == [Cost(3, 0)]
    assert timings["one"].reference == timings["three"].reference == [Cost(4, 0)]
    assert timings["last"].reference == [Cost(7, 0)]
    assert timings["base"].relative == [1, 1, 1]


def test_single_turns_lie_between_those_of_the_reference(run):
    timings = take_turns(("base", run), {"one": run}, seconds=0, rounds=9, least=3, between=1)
    assert timings["base"].seconds == [2, 4, 6, 8]
    assert timings["one"].relative == [1, 1, 1]


def test_the_machine_may_be_half_as_fast_in_the_second_turn():
    timings = Timings([Cost(3, 6), Cost(6, 6)], [Cost(4, 4), Cost(8, 4)])
    assert timings.relative == [0.75, 0.75]
    assert timings.relative_cpu == [1.5, 1.5]


def test_rounds_end_with_their_number_or_the_time(run):
    assert len(take_turns(("a", run), {"b": run}, seconds=1e9, rounds=4)["b"].costs) == 4
    assert len(take_turns(("a", run), {"b": run}, seconds=0, rounds=4)["b"].costs) == 1


def test_every_round_has_everyone_in_another_order():
    names = list("abcde")
    orders = [rotated(names, number) for number in range(4)]
    assert all(sorted(order) == names for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_percentiles_are_values():
    assert [percentile([5, 1, 3], fraction) for fraction in (0, 0.2, 0.5, 0.8, 1)] == [
        *(1, 1, 3, 5, 5)
    ]
    assert spread_columns("ms", [1.5, 0.01, 0.02]) == {
        "ms": "20.0",
        "ms_20": "10.0",
        "ms_80": "1500",
    }


def test_wall_and_cpu_time_are_measured():
    cost = timed(lambda: sum(range(10**6)))
    assert cost.wall > 0
    assert cost.cpu > 0
