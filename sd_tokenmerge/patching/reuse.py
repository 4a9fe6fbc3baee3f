"""Whether a block's partition is computed or reused, over denoising steps and over blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.partitions import Partition
from sd_tokenmerge.patching.call import DenoiserCall
from sd_tokenmerge.patching.one_thread import OneThread

ComputeFeatures = Callable[[], tuple[Tensor, "Tensor | None"]]
"""Computes what a method clusters: tokens `[B, N, C]`, and scores `[B, N]` if it uses them."""

Observer = Callable[[str, Grid, Partition], None]
"""Is told each partition that a block uses, with the block's name and grid."""

_MAX_KEPT_RUNS = 64
"""A block's runs in one step that keep their partitions; later runs compute theirs anew."""


def method_seed(seed: int, block: str, timesteps: tuple[float, ...]) -> int:
    """The seed of a random method, derived only from the arguments; the same in every process.

    Args:
        seed: the patch's seed.
        block: name of the block.
        timesteps: the distinct timesteps of the batch, usually one.

    Returns:
        A number in [0, 2^63).
    """
    text = f"{seed} {block} {timesteps}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class KeptPartition(NamedTuple):
    """A partition that may be reused, with the grid, B, K and period that it was made for.

    The period numbers the groups of `refresh_every` steps. A block that a cache skips in the first
    step of a period must not reuse the partition of an earlier one.
    """

    made_for: tuple[Grid, int, int, int]
    partition: Partition


@dataclass(eq=False)
class BlockPartitions:
    """The partitions of one merged block.

    Attributes:
        path: the block's name.
        source: the earlier block that provides its partitions; None: it has its own.
        ticket: `[registry key, block index]` as an int64 tensor, so that all compiled blocks share
            one graph; see `compiled`.
        times_computed: how many partitions were computed for this block.
        times_reused: how many times a partition from an earlier step or another block was used.
    """

    path: str
    source: BlockPartitions | None
    ticket: Tensor
    times_computed: int = 0
    times_reused: int = 0
    kept: dict[tuple[int, int], KeptPartition] = field(default_factory=dict)
    """By number of the call within its step, and number of the block's run within the call."""


class PartitionReuse:
    """Provides the partition of each merged block in each call of the denoiser."""

    def __init__(
        self,
        method: Method,
        seed: int,
        refresh_every: int,
        paths: list[str],
        sources: list[int | None],
    ) -> None:
        """Prepare the merged blocks.

        Args:
            method: computes the partitions.
            seed: seed of a random method.
            refresh_every: denoising steps that share a partition.
            paths: names of the blocks.
            sources: for each block, the index of the earlier block that provides its partitions,
                or None.
        """
        self.method = method
        self.seed = seed
        self.refresh_every = refresh_every
        self.blocks: list[BlockPartitions] = []
        for index, (path, source) in enumerate(zip(paths, sources, strict=True)):
            source_block = None if source is None else self.blocks[source]
            self.blocks.append(BlockPartitions(path, source_block, torch.tensor([0, index])))
        self.observer: Observer | None = None
        self._keeps = refresh_every > 1 or any(source is not None for source in sources)
        self._call: DenoiserCall | None = None
        self.thread = OneThread()

    @property
    def needs_call(self) -> bool:
        """Whether partitions depend on the call, not only on the block's features."""
        return self._keeps or self.method.uses_seed

    def begin_call(self, call: DenoiserCall) -> None:
        """Note the denoiser's call, before any block runs."""
        self.thread.enter()
        self._call = call
        if call.step == call.number == 0:
            self.forget()

    def end_call(self) -> None:
        """Note that the denoiser's call is over."""
        if self.thread.is_current:
            self._call = None

    def forget(self) -> None:
        """Drop all kept partitions."""
        for block in self.blocks:
            block.kept = {}

    def choose(
        self,
        block: BlockPartitions,
        grid: Grid,
        batch: int,
        num_clusters: int,
        features: ComputeFeatures,
    ) -> Partition:
        """The partition of a block's next run in this call of the denoiser.

        Args:
            block: one of `blocks`.
            grid: layout of its tokens.
            batch: B.
            num_clusters: K.
            features: called only if a partition is computed.

        Raises:
            RuntimeError: partitions depend on the call, and the block runs outside of one, or
                another thread calls the denoiser.
            ValueError: the method can't reach K.
        """
        partition = self._choose(block, grid, batch, num_clusters, features)
        if self.observer is not None:
            self.observer(block.path, grid, partition)
        return partition

    def _choose(
        self,
        block: BlockPartitions,
        grid: Grid,
        batch: int,
        num_clusters: int,
        features: ComputeFeatures,
    ) -> Partition:
        self.thread.require()
        call = self._call
        if call is None:
            if self.needs_call:
                raise RuntimeError(f"{block.path} must be run by its denoiser.")
            call = DenoiserCall()
        made_for = (grid, batch, num_clusters, call.step // self.refresh_every)
        place = (call.number, call.runs[block.path])
        call.runs[block.path] += 1
        kept = (block.source or block).kept.get(place)
        if kept is not None and kept.made_for == made_for:
            block.times_reused += 1
            return kept.partition
        block.times_computed += 1
        tokens, scores = features()
        seed = method_seed(self.seed, (block.source or block).path, call.timesteps)
        partition = self.method(tokens, num_clusters, grid=grid, seed=seed, scores=scores)
        self.thread.require()
        has_room = place in block.kept or len(block.kept) < _MAX_KEPT_RUNS
        if self._keeps and block.source is None and has_room:
            block.kept[place] = KeptPartition(made_for, partition)
        return partition

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without partitions, and is not observed."""
        return self.__dict__ | {"_call": None, "observer": None}
