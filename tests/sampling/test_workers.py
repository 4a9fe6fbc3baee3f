"""Processes of a run, as threads of one process with their counters in a real store."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import TCPStore

from sd_tokenmerge.sampling import workers
from sd_tokenmerge.sampling.workers import LaunchedProcess, OneProcess


def patient() -> bool:
    return True


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[LaunchedProcess]:
    """Three processes that found each other, without a launcher."""
    monkeypatch.setattr(workers, "_POLL_S", 0.01)
    monkeypatch.setattr(workers, "_BEAT_S", 0.02)
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    made = []
    for rank in range(3):
        process = LaunchedProcess.__new__(LaunchedProcess)
        process.rank, process.count = rank, 3
        process._store = (
            server if rank == 0 else TCPStore("127.0.0.1", server.port, is_master=False)
        )
        process._prepare_beating()
        made.append(process)
    yield made
    for process in made:
        process._stopped.set()
        if process._beating is not None:
            process._beating.join(30)


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def keep(index: int) -> None:
        results[index] = calls[index]()

    threads = [threading.Thread(target=keep, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a process waits for ever"
    return results


def test_every_batch_is_taken_once(processes: list[LaunchedProcess]) -> None:
    def work(process: LaunchedProcess) -> list[int]:
        taken = []
        while (number := process.take()) < 50:
            taken.append(number)
            process.add_done(2)
        return taken

    shares = in_threads([lambda one=one: work(one) for one in processes])
    assert sorted(number for share in shares for number in share) == list(range(50))
    assert processes[1].done() == [2 * len(share) for share in shares]


def test_nobody_takes_more_after_a_stop(processes: list[LaunchedProcess]) -> None:
    assert processes[0].take() == 0
    processes[1].take_no_more()
    assert all(process.take() > 1 << 32 for process in processes)


def test_all_wait_for_the_slowest(processes: list[LaunchedProcess]) -> None:
    def late() -> bool:
        time.sleep(0.3)
        return processes[2].wait(patient)

    calls = [*(lambda one=one: one.wait(patient) for one in processes[:2]), late]
    assert in_threads(calls) == [True, True, True]
    in_threads([lambda one=one: one.leave(patient) for one in processes])


def test_a_failure_ends_the_waiting(processes: list[LaunchedProcess]) -> None:
    processes[2].fail()
    assert in_threads([lambda one=one: one.wait(patient) for one in processes[:2]]) == [False] * 2


def test_a_dead_process_ends_the_waiting(
    processes: list[LaunchedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_DEAD_AFTER_S", 0.5)
    assert [process.take() for process in processes] == [0, 1, 2]
    processes[2]._stopped.set()  # as after SIGKILL, on a machine whose launcher nobody hears of
    assert in_threads([lambda one=one: one.wait(patient) for one in processes[:2]]) == [False] * 2


class TimeInBeats:
    """Stands for the time module: a minute passes once every process has shown a sign of life."""

    def __init__(self, processes: list[LaunchedProcess]) -> None:
        self._processes = processes
        self._minutes = 0

    def monotonic(self) -> float:
        return 60.0 * self._minutes

    def sleep(self, seconds: float) -> None:
        before = self._beats()
        give_up = time.monotonic() + 30
        while any(new <= old for new, old in zip(self._beats(), before, strict=True)):
            assert time.monotonic() < give_up, "a process shows no sign of life"
            time.sleep(0.001)
        self._minutes += 1
        if self._minutes == 10:
            for process in self._processes[1:]:
                process._store.add("arrived", 1)

    def _beats(self) -> list[int]:
        return [int(one._store.add(f"beat-{one.rank}", 0)) for one in self._processes]


def test_a_live_process_may_take_its_time(
    processes: list[LaunchedProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_DEAD_AFTER_S", 90.0)
    assert [process.take() for process in processes] == [0, 1, 2]
    in_beats = TimeInBeats(processes)
    monkeypatch.setattr(workers, "time", in_beats)
    assert processes[0].wait(patient) is True
    assert in_beats.monotonic() == 600


def test_impatience_ends_the_waiting(processes: list[LaunchedProcess]) -> None:
    assert processes[0].wait(lambda: False) is False


def test_one_process_takes_all_in_order() -> None:
    alone = OneProcess()
    assert [alone.take(), alone.take()] == [0, 1]
    alone.add_done(3)
    assert alone.done() == [3]
    assert alone.wait(patient)
    alone.take_no_more()
    assert alone.take() > 1 << 32
