from __future__ import annotations

import pytest
import torch

from sd_tokenmerge.processes import Processes, is_first_process, leave_group
from tests.two_processes import start_two

GROUP = """
import torch
from sd_tokenmerge.processes import Processes, is_first_process, leave_group
processes = Processes.join("cpu")
assert Processes.join("cpu") == processes
assert is_first_process() == processes.is_first == (processes.rank == 0)
assert processes.count == 2 and processes.device == torch.device("cpu")
assert processes.broadcast(["from", processes.rank]) == ["from", 0]
assert processes.gather(processes.rank) == [0, 1]
rows = processes.gather(torch.full((2 - processes.rank, 3), float(processes.rank)))
assert [row.tolist() for row in rows] == [[[0.0] * 3] * 2, [[1.0] * 3]]
processes.barrier()
leave_group()
assert not torch.distributed.is_initialized()
"""


@pytest.mark.slow
def test_two_processes_exchange_values() -> None:
    started = start_two(["-c", GROUP])
    errors = [process.communicate(timeout=110)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors


def test_one_process_is_a_group_of_its_own() -> None:
    processes = Processes.join("cpu")
    assert processes == Processes(0, 1, torch.device("cpu"))
    assert processes.is_first
    assert is_first_process()
    assert processes.broadcast("x") == "x"
    assert processes.gather("x") == ["x"]
    processes.barrier()
    leave_group()
    assert not torch.distributed.is_initialized()
