"""Reading the values of timesteps with one wait for the device per generation, not per step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TimestepReader:
    """Reads the timesteps that a denoiser is called with.

    On a GPU, pipelines pass elements of the scheduler's `timesteps`. Fetching one would wait for
    everything that is queued, in every step; instead all of them are fetched with the first.
    """

    def __init__(self) -> None:
        self._fetched: Tensor | None = None
        self._values: list[float] = []

    def read(self, timestep: Tensor | float) -> tuple[float, ...]:
        """The distinct values, ascending; one per image may be given, usually there is one.

        Args:
            timestep: a number, or a tensor with any number of elements.
        """
        if not isinstance(timestep, Tensor):
            return (float(timestep),)
        if timestep.device.type != "cpu" and not any(timestep.stride()):  # one element, expanded
            return (self._element(timestep),)
        return tuple(sorted(set(map(float, timestep.flatten().tolist()))))

    def _element(self, timestep: Tensor) -> float:
        fetched, storage = self._fetched, timestep.untyped_storage()
        if fetched is None or fetched.untyped_storage().data_ptr() != storage.data_ptr():
            # kept alive, so that no other tensor gets its place
            self._fetched = timestep
            self._values = all_elements(timestep)
        return float(self._values[int(timestep.storage_offset())])

    def __getstate__(self) -> dict[str, Any]:
        """A copy has fetched nothing."""
        return {"_fetched": None, "_values": []}


def all_elements(tensor: Tensor) -> list[float]:
    """Every element of the memory that `tensor` is a view of."""
    whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return whole.set_(tensor.untyped_storage()).tolist()
