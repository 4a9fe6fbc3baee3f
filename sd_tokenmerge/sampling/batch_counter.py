"""One counter that hands out the batches of a run to all of its processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sd_tokenmerge.processes import Processes

_NO_MORE = 1 << 40


class ProcessLostError(RuntimeError):
    """Another process of the group has failed or was killed."""


class BatchCounter:
    """Counts the batches taken and the images done, so that no two processes take the same batch.

    A slow process takes fewer batches than the others.
    """

    def __init__(self, processes: Processes) -> None:
        """Connect to the counter of the group; all processes must do so together."""
        from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]

        self._store: Any
        if processes.count == 1:
            self._store = HashStore()
            return
        host = os.environ["MASTER_ADDR"]
        if processes.is_first:
            self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
            processes.broadcast(self._store.port)
        else:
            self._store = TCPStore(host, processes.broadcast(0), is_master=False)

    def take(self) -> int:
        """Number of the next batch; beyond the last when none are left.

        Raises:
            ProcessLostError: the first process has ended, as in all other methods.
        """
        return self._add("next", 1) - 1

    def take_no_more(self) -> None:
        """Keep every process from starting another batch."""
        self._add("next", _NO_MORE)

    def add_done(self, images: int) -> int:
        """Count images that this process finished; returns how many all processes have finished."""
        return self._add("done", images)

    def _add(self, key: str, amount: int) -> int:
        with lost_processes():
            return int(self._store.add(key, amount))


@contextmanager
def lost_processes() -> Iterator[None]:
    """Report a failed communication with other processes as `ProcessLostError`."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessLostError(str(error)) from error
