"""Partitions kept while a pipeline generates, so that they can be looked at afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True, eq=False)
class RecordedPartition:
    """The partition of one block in one step.

    Attributes:
        labels: `[B, frames, height, width]` int32 in [0, K); the cluster of each token. An image is
            one frame. With classifier-free guidance, diffusers puts the unconditional half of the
            batch first.
        num_clusters: K.
    """

    labels: NDArray[np.int32]
    num_clusters: int


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """One call of the denoiser, which pipelines make once per denoising step.

    Attributes:
        timestep: the noisiest timestep of the batch.
        partitions: by the block's name; lacks the blocks that merged nothing in this step.
    """

    timestep: float
    partitions: dict[str, RecordedPartition] = field(default_factory=dict)


class Recording:
    """The partitions that a patched denoiser used, computed or reused; see `PatchHandle.record`.

    Attributes:
        blocks: names of the merged blocks, in the order in which they run.
        steps: the calls of the denoiser during the recording.
    """

    def __init__(self, blocks: tuple[str, ...], timestep_place: int = 1) -> None:
        """Start without steps.

        Args:
            blocks: names of the merged blocks.
            timestep_place: position of the timestep among the denoiser's arguments.
        """
        self._timestep_place = timestep_place
        self.blocks = blocks
        self.steps: list[RecordedStep] = []
        self._known: WeakKeyDictionary[Partition, RecordedPartition] = WeakKeyDictionary()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def begin_step(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the denoiser."""
        place = self._timestep_place
        timestep = args[place] if len(args) > place else kwargs["timestep"]
        value = timestep.max() if isinstance(timestep, Tensor) else timestep
        self.steps.append(RecordedStep(float(value)))

    def add(self, block: str, grid: Grid, partition: Partition) -> None:
        """Record the partition that a block uses; waits for the device.

        Raises:
            RuntimeError: the block runs outside of its denoiser, or twice in one call of it.
        """
        if not self.steps or block in self.steps[-1].partitions:
            raise RuntimeError(
                f"a recording needs every block to run once in each call of its denoiser, "
                f"and {block} runs outside of one, or repeatedly."
            )
        if partition not in self._known:
            labels = partition.labels.to("cpu", torch.int32).view(-1, *grid.shape).numpy()
            self._known[partition] = RecordedPartition(labels, partition.num_clusters)
        self.steps[-1].partitions[block] = self._known[partition]
