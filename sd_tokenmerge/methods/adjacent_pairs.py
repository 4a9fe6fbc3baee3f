"""LoTM's merging of adjacent pairs (eq. 13 to 16), in the sequence and on the grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sd_tokenmerge.kernels.segments import segment_sum
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.methods.distances import unit_tokens
from sd_tokenmerge.methods.numbering import labels_from_roots


def next_size(num_tokens: int, num_clusters: int) -> int:
    """Number of tokens left after the next of n applications from M to K: M (K/M)^(1/n), rounded.

    n is the smallest number of applications that can reach K by halving: M / 2^n <= K.
    """
    left = 1
    while num_clusters << left < num_tokens:
        left += 1
    size = math.ceil(num_tokens * math.pow(num_clusters / num_tokens, 1 / left))
    return max(min(size, num_clusters << (left - 1)), (num_tokens + 1) // 2)


def merge_in_sequence(tokens: Tensor, num_clusters: int) -> Tensor:
    """Merge the pairs (1, 2), (3, 4), ... of a sequence until K remain, `[B, N, C] -> [B, N]`."""
    batch, size, _ = tokens.shape
    labels = torch.arange(size, device=tokens.device).repeat(batch, 1)
    while size > num_clusters:
        next_ = next_size(size, num_clusters)
        # eq. (13) compares directions, and the sum of a cluster has the direction of its mean
        unit = unit_tokens(segment_sum(tokens, labels, size))
        pairs = size // 2
        similarity = (unit[:, 0 : 2 * pairs : 2] * unit[:, 1 : 2 * pairs : 2]).sum(-1)
        # eq. (14)
        chosen = similarity.argsort(dim=1, descending=True, stable=True)[:, : size - next_]
        # eq. (16): the second token of a chosen pair joins the first
        starts = torch.ones_like(labels[:, :size], dtype=torch.bool)
        starts.scatter_(1, 2 * chosen + 1, False)
        labels = (starts.cumsum(1) - 1).gather(1, labels)
        size = next_
    return labels


def merge_on_grid(tokens: Tensor, num_clusters: int, grid: Grid) -> Tensor:
    """Merge pairs of neighbours in a row, a column or time until K remain, `[N, C] -> [N]`."""
    roots = torch.arange(grid.num_tokens, device=tokens.device)
    size = grid.num_tokens
    while size > num_clusters:
        edges = _neighbours(roots.view(grid.shape))
        one, other = (torch.cat([edge[end].flatten() for edge in edges]) for end in (0, 1))
        unit = unit_tokens(segment_sum(tokens[None], roots[None], grid.num_tokens)[0])
        unit = unit[roots].view(*grid.shape, -1)
        # eq. (13)
        similarity = torch.cat([(a * b).sum(-1).flatten() for a, b in _neighbours(unit)])
        similarity.masked_fill_(one == other, -torch.inf)
        order = similarity.argsort(descending=True, stable=True)
        one, other = one[order], other[order]
        pairs = match_greedily(one, other, grid.num_tokens)
        # eq. (14)
        pairs = pairs[: size - next_size(size, num_clusters)]
        # eq. (16)
        parent = torch.arange(grid.num_tokens, device=tokens.device)
        parent[torch.maximum(one[pairs], other[pairs])] = torch.minimum(one[pairs], other[pairs])
        roots = parent[roots]
        size -= len(pairs)
    return labels_from_roots(roots[None])[0]


def match_greedily(one: Tensor, other: Tensor, num_nodes: int) -> Tensor:
    """Walk through the edges of a graph and take each whose ends are both free, in parallel.

    Repeatedly taking every free edge that precedes all free edges it shares an end with selects
    the same edges as walking through them one by one.

    Args:
        one: `[E]` int64, one end of each edge, best edge first.
        other: `[E]` int64, the other end; an edge from a node to itself is never taken.
        num_nodes: the ends are in `[0, num_nodes)`.

    Returns:
        The indices of the taken edges in ascending order, int64.
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


def _neighbours(places: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pair every place with the next in its row, its column and time; `places` `[F, H, W, ...]`."""
    return [
        (places[:, :, :-1], places[:, :, 1:]),
        (places[:, :-1], places[:, 1:]),
        (places[:-1], places[1:]),
    ]
