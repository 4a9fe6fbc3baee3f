"""Three processes of a run, as threads of one process with a real store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest
import torch

from sd_tokenmerge.processes import Processes
from sd_tokenmerge.sampling.batch_counter import BatchCounter, ProcessLostError, lost_processes


class Threads(Processes):
    """One of three processes, run as a thread."""

    def __init__(self, rank: int, ports: Queue[Any]) -> None:
        super().__init__(rank, 3, torch.device("cpu"))
        object.__setattr__(self, "_ports", ports)

    def broadcast(self, value: Any) -> Any:
        if self.is_first:
            for _ in range(2):
                self._ports.put(value)  # type: ignore[attr-defined]
            return value
        return self._ports.get(timeout=30)  # type: ignore[attr-defined]


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> list[BatchCounter]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    ports: Queue[Any] = Queue()
    return in_threads([lambda rank=rank: BatchCounter(Threads(rank, ports)) for rank in range(3)])


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        waiting = [pool.submit(call) for call in calls]
        return [one.result(timeout=60) for one in waiting]


def test_every_batch_is_taken_once(counters: list[BatchCounter]) -> None:
    def work(counter: BatchCounter) -> list[int]:
        taken = []
        while (number := counter.take()) < 50:
            taken.append(number)
            counter.add_done(2)
        return taken

    shares = in_threads([lambda one=one: work(one) for one in counters])
    assert sorted(number for share in shares for number in share) == list(range(50))
    assert counters[1].add_done(0) == 100


def test_nobody_takes_more_after_a_stop(counters: list[BatchCounter]) -> None:
    assert counters[0].take() == 0
    counters[1].take_no_more()
    assert all(counter.take() > 1 << 32 for counter in counters)


def test_without_the_first_process_the_others_learn_that_it_is_lost(
    counters: list[BatchCounter],
) -> None:
    assert counters[1].take() == 0
    counters[0]._store = None  # the store ends with its process
    with pytest.raises(ProcessLostError):
        counters[1].take()
    with pytest.raises(ProcessLostError, match="gone"), lost_processes():
        raise RuntimeError("gone")


def test_one_process_takes_all_in_order() -> None:
    alone = BatchCounter(Processes(0, 1, torch.device("cpu")))
    assert [alone.take(), alone.take()] == [0, 1]
    assert alone.add_done(3) == 3
    alone.take_no_more()
    assert alone.take() > 1 << 32
