"""When a partition is computed and when one is reused, over denoising steps and over blocks.

A step is an entry of the scheduler's `timesteps`, recognised by the `timestep` that the denoiser is
called with: an element of that tensor, so its place in memory tells which generation it belongs to
(each one makes new `timesteps`) and how far that one has come, without waiting for the device and
also after an aborted run. A timestep that is a new tensor in every call counts as a new generation:
nothing is reused, nothing is wrong. Plain numbers are compared by value.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sd_tokenmerge.kernels.backend import OUTSIDE_CUDA_GRAPHS
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.partitions import Partition
from sd_tokenmerge.timesteps import TimestepReader

Features = Callable[[], tuple[Tensor, "Tensor | None"]]
"""Computes what a method clusters: tokens `[B, N, C]`, and scores `[B, N]` if it uses them."""

_MAX_KEPT_CALLS = 64
"""Calls of the denoiser in one step whose partitions are kept; later ones compute theirs anew."""


def method_seed(seed: int, block: str, timesteps: tuple[float, ...]) -> int:
    """The seed of a random method, from these three alone; the same in every process.

    Args:
        seed: the patch's seed.
        block: name of the block.
        timesteps: the distinct timesteps of the batch, usually one.

    Returns:
        A number in [0, 2^63).
    """
    text = f"{seed} {block} {timesteps}"
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class _Kept(NamedTuple):
    shape: tuple[Grid, int, int]
    """Grid, B and K."""
    partition: Partition


class _Place(NamedTuple):
    """Where a timestep is: in which scheduler's `timesteps`, and where in there."""

    generation: int
    position: float


@dataclass(eq=False)
class BlockSchedule:
    """One merged block's part of a schedule.

    Attributes:
        path: the block's name.
        source: the block whose partitions it uses, which runs before it; None: it has its own.
        ticket: what a compiled block passes for itself, `[2]` int64: a tensor, so that all blocks
            can share one graph.
        times_computed: how many partitions were computed for this block.
        times_reused: how often an earlier one, or its source's, was used.
    """

    path: str
    source: BlockSchedule | None
    ticket: Tensor
    times_computed: int = 0
    times_reused: int = 0
    _latest: _Kept | None = None
    _kept: dict[int, _Kept] = field(default_factory=dict)
    """By the number of the denoiser's call within a step: most pipelines make one, some several."""

    def forget(self) -> None:
        """Drop all partitions."""
        self._latest = None
        self._kept = {}

    def recall(self, call: int) -> _Kept | None:
        """The partition of the last refresh, or that of the source."""
        return self._kept.get(call) if self.source is None else self.source._latest

    def keep(self, call: int, kept: _Kept) -> None:
        """Remember a partition for the same call of later steps, and for other blocks."""
        self._latest = kept
        if call < _MAX_KEPT_CALLS:
            self._kept[call] = kept


class Schedule:
    """Hands out the partition of each merged block in each call of the denoiser."""

    def __init__(
        self,
        method: Method,
        seed: int,
        refresh_every: int,
        paths: list[str],
        sources: list[int | None],
    ) -> None:
        """Plan for merged blocks.

        Args:
            method: what computes a partition.
            seed: what a random method's seeds are derived from.
            refresh_every: steps from one partition of a block to the next.
            paths: names of the blocks.
            sources: for each block, the index of an earlier one whose partitions it uses, or None.
        """
        self.method = method
        self.seed = seed
        self.refresh_every = refresh_every
        self.needs_timestep = refresh_every > 1 or method.uses_seed
        self.blocks: list[BlockSchedule] = []
        for index, (path, source) in enumerate(zip(paths, sources, strict=True)):
            source_block = None if source is None else self.blocks[source]
            self.blocks.append(BlockSchedule(path, source_block, torch.tensor([0, index])))
        self._keeps = refresh_every > 1 or any(source is not None for source in sources)
        self._has_representatives = method.has_representatives
        self._place: _Place | None = None
        self._timestep: Tensor | float | None = None
        self._timesteps: tuple[float, ...] = ()
        self._reader = TimestepReader()
        self._step = self._call = 0
        self._register()

    def begin_call(self, timestep: Tensor | float) -> None:
        """Note the denoiser's timestep; once per call, before any block, where `needs_timestep`."""
        if self.refresh_every > 1:
            self._locate(timestep)
        if self.method.uses_seed:
            self._timesteps = self._reader.read(timestep)

    def partition(
        self, block: BlockSchedule, grid: Grid, batch: int, num_clusters: int, features: Features
    ) -> Partition:
        """The partition of a block in this call of the denoiser.

        Args:
            block: one of `blocks`.
            grid: layout of its tokens.
            batch: B.
            num_clusters: K.
            features: not called where a partition is reused, except in a compiled graph.

        Raises:
            ValueError: K is out of the method's reach.
        """
        if not torch.compiler.is_compiling():
            return self._partition(block, grid, batch, num_clusters, features)
        # A compiled graph is the same in every step: the decision is taken inside an operator.
        labels, representatives = _scheduled_labels(
            *features(),
            block.ticket,
            num_clusters,
            grid.height,
            grid.width,
            num_clusters if self._has_representatives else 0,
        )
        return Partition(
            labels, num_clusters, representatives if self._has_representatives else None
        )

    def _partition(
        self, block: BlockSchedule, grid: Grid, batch: int, num_clusters: int, features: Features
    ) -> Partition:
        shape = (grid, batch, num_clusters)
        refresh = block.source is None and self._step % self.refresh_every == 0
        kept = None if refresh else block.recall(self._call)
        if kept is not None and kept.shape == shape:
            block.times_reused += 1
        else:
            block.times_computed += 1
            tokens, scores = features()
            seed = method_seed(self.seed, (block.source or block).path, self._timesteps)
            kept = _Kept(
                shape, self.method(tokens, num_clusters, grid=grid, seed=seed, scores=scores)
            )
        if self._keeps and block.source is None:
            block.keep(self._call, kept)
        return kept.partition

    def _locate(self, timestep: Tensor | float) -> None:
        if isinstance(timestep, Tensor):
            place = _Place(timestep.untyped_storage().data_ptr(), int(timestep.storage_offset()))
        else:
            place = _Place(0, -timestep)
        before, self._place = self._place, place
        self._timestep = timestep  # kept alive, so that no later generation gets its place
        if before is None or before.generation != place.generation:
            self._start_generation()
        elif place.position == before.position:
            self._call += 1
        elif place.position > before.position:
            self._step, self._call = self._step + 1, 0
        else:
            self._start_generation()

    def _start_generation(self) -> None:
        self._step = self._call = 0
        for block in self.blocks:
            block.forget()

    def _register(self) -> None:
        key = next(_KEYS)
        for block in self.blocks:
            block.ticket[0] = key
        _SCHEDULES[key] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy starts without partitions, and is known to compiled graphs as itself."""
        self.__dict__.update(state)
        self._place = self._timestep = None
        self._start_generation()
        self._register()


_KEYS = itertools.count()
_SCHEDULES: weakref.WeakValueDictionary[int, Schedule] = weakref.WeakValueDictionary()


@torch.library.custom_op("sd_tokenmerge::scheduled_labels", mutates_args=(), **OUTSIDE_CUDA_GRAPHS)
def _scheduled_labels(
    tokens: Tensor,
    scores: Tensor | None,
    ticket: Tensor,
    num_clusters: int,
    height: int,
    width: int,
    num_representatives: int,
) -> tuple[Tensor, Tensor]:
    key, index = ticket.tolist()
    schedule = _SCHEDULES[key]
    partition = schedule._partition(
        schedule.blocks[index],
        Grid(height, width),
        tokens.shape[0],
        num_clusters,
        lambda: (tokens, scores),
    )
    labels, representatives = partition.labels, partition.representatives
    if representatives is None:
        representatives = labels.new_empty(labels.shape[0], 0)
    return labels.clone(), representatives.clone()  # the graph may overwrite what it is given


@_scheduled_labels.register_fake
def _(
    tokens: Tensor,
    scores: Tensor | None,
    ticket: Tensor,
    num_clusters: int,
    height: int,
    width: int,
    num_representatives: int,
) -> tuple[Tensor, Tensor]:
    batch, count, _ = tokens.shape
    return (
        tokens.new_empty(batch, count, dtype=torch.int64),
        tokens.new_empty(batch, num_representatives, dtype=torch.int64),
    )
