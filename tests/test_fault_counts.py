from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tests.conftest import count_faults


def report(when: str, *recorded: tuple[str, int]) -> Any:
    return SimpleNamespace(when=when, user_properties=list(recorded))


def test_counts_of_all_fault_tests_are_added_up() -> None:
    reports = [
        report("call", ("kills survived", 20), ("images lost", 0), ("other", 7)),
        report("teardown", ("kills survived", 20)),  # the same test again
        report("call", ("kills survived", 3), ("images lost", 1)),
        SimpleNamespace(message="a warning"),
    ]
    assert count_faults(reports) == (
        "faults: 23 kills survived, 0 damages found and repaired, 1 images lost"
    )


def test_nothing_is_said_without_fault_tests() -> None:
    assert count_faults([report("call"), report("call", ("other", 1))]) is None
