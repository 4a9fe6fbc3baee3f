"""The nearest of a few candidates, each the nearest for all that a coarser search could tell."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sd_tokenmerge.kernels.cluster_pairs import ClusterPairs
from sd_tokenmerge.kernels.exact import best_of_pairs

_PAIRS_PER_ROW = 64  # above this many exact token pairs, one exact product per member is cheaper


class Candidates(NamedTuple):
    """Pairs of clusters, of which the nearest for each of M clusters is to be found."""

    clusters: Tensor
    """`[M]` int64."""
    place: Tensor
    """`[P]` int64 in [0, M): whose candidate it is."""
    others: Tensor
    """`[P]` int64: the candidate."""


def nearest_quickly(
    candidates: Candidates, columns: Tensor, known: ClusterPairs
) -> tuple[Tensor, Tensor]:
    """Nearest of the candidates, by float32 where that suffices; bound on the next one.

    Args:
        candidates: at least one for each of M clusters.
        columns: see `nearest_exactly`.
        known: of all clusters.

    Returns:
        `[M]` int64 and `[M]` float64.
    """
    clusters, place, others = candidates
    value = known.quick(clusters[place], others)
    lowest = value.new_full((len(clusters),), -torch.inf)
    best = lowest.scatter_reduce(0, place, value, "amax")
    near = value >= best[place] - 2 * known.rows.error
    nearest = clusters.clone()
    nearest[place[near]] = others[near]
    next_one = lowest.scatter_reduce(0, place[~near], value[~near], "amax")
    tied = torch.bincount(place[near], minlength=len(clusters)) > 1
    if bool(tied.any()):
        close = _only(candidates, tied, near)
        nearest[tied] = nearest_exactly(close, columns, known)
        next_one[tied] = best[tied]
    return nearest, next_one + known.rows.error


def nearest_exactly(candidates: Candidates, columns: Tensor, known: ClusterPairs) -> Tensor:
    """Nearest of the candidates by exact similarities, `-> [M]` int64.

    Args:
        candidates: at least one for each of M clusters.
        columns: `[K]` int64, by descending size; what the candidates were chosen from.
        known: of all clusters.
    """
    clusters, place, others = candidates
    sizes = known.members.sizes
    pairs = torch.zeros_like(clusters).scatter_add_(0, place, sizes[others])
    many = pairs > _PAIRS_PER_ROW
    nearest = clusters.clone()
    if not bool(many.all()):
        few = _only(candidates, ~many)
        exact = known.exact(few.clusters[few.place], few.others)
        nearest[~many] = best_of_pairs(exact, few.place, few.clusters, few.others)
    if bool(many.any()):
        nearest[many] = known.nearest_of_all(clusters[many], columns)
    return nearest


def _only(candidates: Candidates, chosen: Tensor, kept: Tensor | bool = True) -> Candidates:
    """Those of some clusters, `[M]` bool, and of these only some, `[P]` bool."""
    clusters, place, others = candidates
    kept = chosen[place] & kept
    return Candidates(clusters[chosen], (chosen.cumsum(0) - 1)[place[kept]], others[kept])
