"""Turns of contestants, and the calls that they are related to."""

from __future__ import annotations

import pytest
from pipeline_contestants import Contestant
from timed_unet import QUICK_CONFIG, QUICK_LATENT, TimedUNet
from turns import Timings, take_turns


def test_kept_partitions_are_averaged_over_their_life():
    assert Timings(4, [5.0, 6.0], [2.0, 1.0]).steps() == [(5 + 3 * 2) / 4, (6 + 3 * 1) / 4]
    assert Timings(1, [5.0, 6.0]).steps() == [5.0, 6.0]


def test_steps_are_related_to_the_time():
    """The machine is half as fast in the second turn."""
    assert Timings(2, [4.0, 8.0], [2.0, 4.0], [4.0, 8.0]).relative() == [0.75, 0.75]


@pytest.fixture
def calls(monkeypatch):
    """The n-th call takes n seconds."""
    calls = TimedUNet(QUICK_CONFIG, QUICK_LATENT, 1, "cpu", "float32")
    clock = iter(range(1, 1000))
    monkeypatch.setattr(calls, "timed", lambda step: float(next(clock)))
    return calls


ONE, TWO, LAST = (Contestant(name, {"method": "random"}) for name in ("one", "two", "last"))
KEPT = Contestant("kept", {"method": "random", "refresh_every": 5})
RARE = Contestant("rare", {"method": "random"}, rounds=1)


def test_neighbours_are_the_calls_around(calls):
    timings = take_turns(calls, [Contestant("unpatched"), ONE, TWO, KEPT, LAST], 0, 10)
    # 1 is for warming up
    assert timings["unpatched"].fresh == [2.0, 7.0, 9.0]
    assert (timings["one"].fresh, timings["one"].unpatched) == ([3.0], [4.5])
    assert (timings["two"].fresh, timings["two"].unpatched) == ([4.0], [4.5])
    assert (timings["kept"].fresh, timings["kept"].unpatched) == ([5.0], [4.5])
    assert timings["kept"].kept == [6.0]
    assert (timings["last"].fresh, timings["last"].unpatched) == ([8.0], [8.0])
    assert timings["unpatched"].relative() == [1.0, 1.0, 1.0]


def test_the_unpatched_model_takes_turns_anyway(calls):
    assert list(take_turns(calls, [ONE], 0, 1)) == ["unpatched", "one"]
    assert take_turns(calls, [Contestant("unpatched")], 0, 1)["unpatched"].fresh


def test_rounds_end_with_their_number_or_the_time(calls):
    timings = take_turns(calls, [ONE, RARE], 1e9, 3)
    assert {name: len(taken.fresh) for name, taken in timings.items()} == {
        "unpatched": 4,
        "one": 3,
        "rare": 1,
    }
    assert len(take_turns(calls, [ONE, RARE], 0, 3)["one"].fresh) == 1
