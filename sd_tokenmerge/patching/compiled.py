"""Partitions under `torch.compile`: one operator that decides at run time.

A compiled graph is the same in every step, so whether to compute or reuse a partition is decided
inside an operator. Tensors can't carry Python objects into it; a ticket names the block instead.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from sd_tokenmerge.kernels.backend import OUTSIDE_CUDA_GRAPHS
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.partitions import Partition
from sd_tokenmerge.patching.reuse import ComputeFeatures, PartitionReuse

_KEYS = itertools.count()
_REGISTRY: weakref.WeakValueDictionary[int, PartitionReuse] = weakref.WeakValueDictionary()


def register(reuse: PartitionReuse) -> None:
    """Write the tickets by which compiled graphs find `reuse`."""
    key = next(_KEYS)
    for block in reuse.blocks:
        block.ticket[0] = key
    _REGISTRY[key] = reuse


def is_in_backward() -> bool:
    """Whether autograd is running a backward pass on this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def choose_in_graph(
    method: Method, ticket: Tensor, grid: Grid, num_clusters: int, features: ComputeFeatures
) -> Partition:
    """`PartitionReuse.choose` as one operator of the graph that is being compiled.

    Features are computed in every step, because a graph has no branches. `ticket` is the block's.
    """
    has_representatives = method.has_representatives
    labels, representatives = _choose_labels(
        *features(),
        ticket,
        num_clusters,
        list(grid),
        num_clusters if has_representatives else 0,
    )
    return Partition(labels, num_clusters, representatives if has_representatives else None)


@torch.library.custom_op("sd_tokenmerge::choose_labels", mutates_args=(), **OUTSIDE_CUDA_GRAPHS)
def _choose_labels(
    tokens: Tensor,
    scores: Tensor | None,
    ticket: Tensor,
    num_clusters: int,
    grid: Sequence[int],
    num_representatives: int,
) -> tuple[Tensor, Tensor]:
    if is_in_backward():
        raise RuntimeError(
            "token merging can't be combined with gradient checkpointing of compiled blocks: the "
            "recomputed block could get another partition. Compile or checkpoint, not both."
        )
    key, index = ticket.tolist()
    reuse = _REGISTRY[key]
    partition = reuse.choose(
        reuse.blocks[index],
        Grid(*grid),
        tokens.shape[0],
        num_clusters,
        lambda: (tokens, scores),
    )
    labels, representatives = partition.labels, partition.representatives
    if representatives is None:
        representatives = labels.new_empty(labels.shape[0], 0)
    return labels.clone(), representatives.clone()  # the graph may overwrite what it is given


@_choose_labels.register_fake
def _(
    tokens: Tensor,
    scores: Tensor | None,
    ticket: Tensor,
    num_clusters: int,
    grid: Sequence[int],
    num_representatives: int,
) -> tuple[Tensor, Tensor]:
    batch, count, _ = tokens.shape
    return (
        tokens.new_empty(batch, count, dtype=torch.int64),
        tokens.new_empty(batch, num_representatives, dtype=torch.int64),
    )
