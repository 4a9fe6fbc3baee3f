"""One process or several that work together, started by `accelerate launch` or torchrun."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from sd_tokenmerge.devices import resolve_device

if TYPE_CHECKING:
    import torch

_Value = TypeVar("_Value")

TIMEOUT = timedelta(days=1)
"""How long a process waits for the others. The launcher ends all processes when one dies, so this
only has to exceed the lag of the slowest process."""


def is_first_process() -> bool:
    """Whether this process prints and writes; does not join a group."""
    return int(os.environ.get("RANK", "0")) == 0


def leave_group() -> None:
    """End the group if this process joined one; torch warns about one left at exit."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """This process's place in its group; a process on its own is a group of one.

    All processes of a group must make the same calls in the same order.

    Attributes:
        rank: number of this process, from 0.
        count: number of processes.
        device: this process's own device.
    """

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str | torch.device | None = None) -> Processes:
        """Join the group that the launcher's environment variables describe, once or repeatedly.

        Args:
            device: what the user asked for; None for the best there is. In a group, `"cpu"` puts
                every process on the CPU, and anything else gives each process its own device.

        Raises:
            ValueError: this machine has no such device.
        """
        resolved = resolve_device(device)
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(0, 1, resolved)
        from accelerate import PartialState

        state = PartialState(cpu=resolved.type == "cpu", timeout=TIMEOUT)
        own = resolved if resolved.type == "cpu" else state.device
        return cls(int(state.process_index), int(state.num_processes), own)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def broadcast(self, value: _Value) -> _Value:
        """The first process's value, in every process; it must be picklable."""
        if self.count == 1:
            return value
        from accelerate.utils import broadcast_object_list

        box = [value]
        broadcast_object_list(box, from_process=0)
        return box[0]

    def agree(self, decide: Callable[[], _Value]) -> _Value:
        """Let the first process decide; every process returns its result, or raises its error.

        Args:
            decide: called in the first process only; `ValueError`, `TypeError` and `OSError` are
                passed on to the others.
        """
        result: Any = None
        if self.is_first:
            try:
                result = decide()
            except (ValueError, TypeError, OSError) as error:
                result = error
        result = self.broadcast(result)
        if isinstance(result, Exception):
            raise result
        return result  # type: ignore[no-any-return]

    def gather(self, value: _Value) -> list[_Value]:
        """All processes' values in the order of their ranks, in every process; picklable."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        values: list[_Value] = gather_object([value])
        return values

    def barrier(self) -> None:
        """Wait until every process has called this.

        Raises:
            RuntimeError: another process has ended, or did not call this within `TIMEOUT`.
        """
        if self.count > 1:
            from accelerate import PartialState

            PartialState().wait_for_everyone()
