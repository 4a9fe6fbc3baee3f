"""One process or many: who I am, and which batch is next.

Several processes are started by `accelerate launch`, or by torchrun, which that uses. Batches are
handed out by one shared counter, so that a slow process takes fewer and no two take the same.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch

_Value = TypeVar("_Value")

_POLL_S = 0.2
_BEAT_S = 10.0
_DEAD_AFTER_S = 180.0
_NO_MORE = 1 << 40


class Workers(Protocol):
    """What the processes of a run do together.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
    """

    rank: int
    count: int

    def own_device(self, device: str) -> str:
        """This process's own device of the kind that was asked for."""

    def broadcast(self, value: _Value) -> _Value:
        """The first process's value, in every process."""

    def take(self) -> int:
        """Number of the next batch; past the end when there are no more."""

    def take_no_more(self) -> None:
        """Let nobody start another batch."""

    def add_done(self, images: int) -> None:
        """Tell the others how many images this process finished."""

    def done(self) -> list[int]:
        """Images finished so far, by process."""

    def wait(self, is_patient: Callable[[], bool]) -> bool:
        """Wait until no process works any more, or one has failed or died.

        Args:
            is_patient: called meanwhile; the waiting ends when it returns false.

        Returns:
            Whether all came to their end.
        """

    def leave(self, is_patient: Callable[[], bool]) -> None:
        """Say goodbye after `wait`; none of the above may be called any more."""

    def fail(self) -> None:
        """Tell the others that this process ends with an error."""


class OneProcess:
    """A process of its own: takes all batches in order."""

    rank = 0
    count = 1

    def __init__(self) -> None:
        self._next = 0
        self._done = 0

    def own_device(self, device: str) -> str:  # noqa: D102
        return device

    def broadcast(self, value: _Value) -> _Value:  # noqa: D102
        return value

    def take(self) -> int:  # noqa: D102
        self._next += 1
        return self._next - 1

    def take_no_more(self) -> None:  # noqa: D102
        self._next = _NO_MORE

    def add_done(self, images: int) -> None:  # noqa: D102
        self._done += images

    def done(self) -> list[int]:  # noqa: D102
        return [self._done]

    def wait(self, is_patient: Callable[[], bool]) -> bool:  # noqa: D102
        return True

    def leave(self, is_patient: Callable[[], bool]) -> None:  # noqa: D102
        return

    def fail(self) -> None:  # noqa: D102
        return


class LaunchedProcess:
    """One of the processes that `accelerate launch` started, on one machine or several."""

    _beating: threading.Thread | None

    def __init__(self, device: str) -> None:
        from accelerate import PartialState

        state = PartialState(cpu=torch.device(device).type == "cpu")
        self.rank = int(state.process_index)
        self.count = int(state.num_processes)
        self._device = str(state.device)
        self._store = self._open_store()
        self._prepare_beating()
        atexit.register(state.destroy_process_group)
        atexit.register(self._stopped.set)

    def own_device(self, device: str) -> str:  # noqa: D102
        return device if torch.device(device).type == "cpu" else self._device

    def broadcast(self, value: _Value) -> _Value:  # noqa: D102
        from accelerate.utils import broadcast_object_list

        box = [value]
        broadcast_object_list(box, from_process=0)
        return box[0]

    def take(self) -> int:  # noqa: D102
        if self._beating is None:
            self._beating = threading.Thread(target=self._beat, daemon=True)
            self._beating.start()
        return int(self._store.add("next", 1)) - 1

    def take_no_more(self) -> None:  # noqa: D102
        self._store.add("next", _NO_MORE)

    def add_done(self, images: int) -> None:  # noqa: D102
        self._store.add(f"done-{self.rank}", images)

    def done(self) -> list[int]:  # noqa: D102
        return [int(self._store.add(f"done-{rank}", 0)) for rank in range(self.count)]

    def wait(self, is_patient: Callable[[], bool]) -> bool:  # noqa: D102
        # Not a barrier: those give up after some minutes, less than a slow batch may take.
        return self._gather("arrived", is_patient)

    def leave(self, is_patient: Callable[[], bool]) -> None:  # noqa: D102
        if self.rank == 0:  # the counters live here, and the others still read them
            self._gather("left", is_patient)
        else:
            self._store.add("left", 1)
        self._stopped.set()

    def fail(self) -> None:  # noqa: D102
        self._store.add("failed", 1)

    def _prepare_beating(self) -> None:
        self._beats = [(0, time.monotonic())] * self.count
        self._stopped = threading.Event()
        self._beating = None

    def _beat(self) -> None:
        """Show the others that this process lives; a thread does, however long a batch takes."""
        with suppress(RuntimeError):  # the first process, who holds the counters, has ended
            while not self._stopped.wait(_BEAT_S):
                self._store.add(f"beat-{self.rank}", 1)

    def _all_live(self) -> bool:
        """Whether every process has shown a sign of life lately."""
        now = time.monotonic()
        for rank, (beat, since) in enumerate(self._beats):
            if (newest := int(self._store.add(f"beat-{rank}", 0))) != beat:
                self._beats[rank] = newest, now
            elif now - since > _DEAD_AFTER_S:
                return False
        return True

    def _gather(self, key: str, is_patient: Callable[[], bool]) -> bool:
        here = int(self._store.add(key, 1))
        self._beats = [(beat, time.monotonic()) for beat, _ in self._beats]
        while here < self.count:
            if int(self._store.add("failed", 0)) or not is_patient() or not self._all_live():
                return False
            time.sleep(_POLL_S)
            here = int(self._store.add(key, 0))
        return True

    def _open_store(self) -> Any:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        host = os.environ["MASTER_ADDR"]
        if self.rank == 0:
            store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            self.broadcast(store.port)
            return store
        return TCPStore(host, self.broadcast(0), is_master=False)


def find_workers(device: str) -> Workers:
    """This process's place among those that were launched together.

    Args:
        device: where the pipeline is to run.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return LaunchedProcess(device)
    return OneProcess()
