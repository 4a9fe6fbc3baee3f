"""Merging of neighbours on the grid: LoTM's pairs in two dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.segments import segment_sum
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.methods.distances import unit_tokens
from sd_tokenmerge.methods.numbering import labels_from_roots


def merge_grid_neighbours(tokens: Tensor, num_clusters: int, grid: Grid) -> Tensor:
    """Merge the most similar pairs of neighbours until K clusters remain, `[N, C] -> [N]`.

    One application matches clusters greedily in the order of cosine similarity, each with at most
    one neighbour, and merges the best pairs. It is repeated on the merged clusters until K remain.
    """
    first, second = _neighbours(grid, tokens.device)
    roots = torch.arange(grid.num_tokens, device=tokens.device)
    size = grid.num_tokens
    while size > num_clusters:
        unit = unit_tokens(segment_sum(tokens[None], roots[None], grid.num_tokens)[0])
        one, other = roots[first], roots[second]
        # eq. (13)
        similarity = (unit[one] * unit[other]).sum(-1).masked_fill_(one == other, -torch.inf)
        order = similarity.argsort(descending=True, stable=True)
        one, other = one[order], other[order]
        pairs = match_greedily(one, other, grid.num_tokens)
        # eq. (14)
        pairs = pairs[: size - num_clusters]
        # eq. (16)
        parent = torch.arange(grid.num_tokens, device=tokens.device)
        parent[torch.maximum(one[pairs], other[pairs])] = torch.minimum(one[pairs], other[pairs])
        roots = parent[roots]
        size -= len(pairs)
    return labels_from_roots(roots[None])[0]


def match_greedily(one: Tensor, other: Tensor, num_nodes: int) -> Tensor:
    """Go through the edges of a graph and take each whose two ends are both free, in parallel.

    Taking every edge that comes before all edges it shares an end with, again and again on what is
    left, takes the same edges as going through them one by one.

    Args:
        one: `[E]` int64 one end of each edge, best edge first.
        other: `[E]` int64 its other end; an edge from a node to itself is never taken.
        num_nodes: the ends are in `[0, num_nodes)`.

    Returns:
        The indices of the taken edges, in ascending order.
    """
    edges = torch.arange(len(one), device=one.device)
    free = one != other
    taken = torch.zeros_like(free)
    while bool(free.any()):
        place = torch.where(free, edges, len(one))
        first = one.new_full((num_nodes,), len(one))
        first = first.scatter_reduce(0, one, place, "amin").scatter_reduce(0, other, place, "amin")
        now = free & (first[one] == edges) & (first[other] == edges)
        taken |= now
        used = torch.zeros(num_nodes, dtype=torch.bool, device=one.device)
        used[one[now]] = True
        used[other[now]] = True
        free &= ~(used[one] | used[other])
    return taken.nonzero()[:, 0]


def _neighbours(grid: Grid, device: torch.device) -> tuple[Tensor, Tensor]:
    """Every token with its right, then every token with its lower neighbour."""
    index = torch.arange(grid.num_tokens, device=device).view(grid)
    first = torch.cat([index[:, :-1].reshape(-1), index[:-1].reshape(-1)])
    second = torch.cat([index[:, 1:].reshape(-1), index[1:].reshape(-1)])
    return first, second
