"""Hierarchies by rounds of reciprocal nearest neighbours.

In a round, all pairs of clusters that are each other's nearest neighbour are merged at once. For a
reducible linkage, D(I + J, L) >= min(D(I, L), D(J, L)): merging a reciprocal pair brings no cluster
nearer to another, so the other pairs stay reciprocal, and the hierarchy is that of merging the
globally closest pair again and again (the nearest-neighbour chain of Benzecri and Juan, 1982; in
parallel: Sumengen et al., "Scaling hierarchical agglomerative clustering to billion-sized
datasets", 2021).

A cut at K clusters needs only the N - K lowest merges. As soon as that many have been made, the (N
- K)-th lowest of their heights bounds what can still matter: a cluster whose nearest neighbour is
farther is never looked at again.

The images of a batch go through the rounds together, which costs no more calls than one image; none
of them affects another.

Ties: a cluster is known by its lowest token. Of several clusters at exactly the same distance, the
nearest is the one whose number differs least in the sense of XOR. Two pairs with a common member
never tie, so nearest neighbours cannot form a cycle and every round merges at least one pair; and
tokens that all tie (duplicates, orthogonal vectors) form a balanced tree in log2(N) rounds, where
"the lowest number first" would chain them in N - 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sd_tokenmerge.kernels.hierarchy import Merges, concatenate


class Clusters(ABC):
    """The clusters of B images under some linkage; a cluster is known by its lowest token.

    Token n of image b has the number `b * N + n` throughout.

    Attributes:
        num_tokens: N, of each image.
        alive: `[B * N]` bool; which tokens name a cluster.
        root: `[B * N]` int64; the cluster each token is in.
    """

    def __init__(self, batch: int, num_tokens: int, device: torch.device) -> None:
        self.num_tokens = num_tokens
        self.alive = torch.ones(batch * num_tokens, dtype=torch.bool, device=device)
        self.root = torch.arange(batch * num_tokens, device=device)

    @abstractmethod
    def first_neighbours(self) -> Tensor:
        """Nearest other cluster of every token, `[B * N]` int64; N is at least 2."""

    @abstractmethod
    def neighbours(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """Nearest other cluster of the given ones, `[M] -> [M]` int64.

        Args:
            clusters: `[M]` int64, alive, ascending; those whose former nearest neighbour was
                merged, and new ones.
            floor: `[M]` float64; a cluster without any other of at least this similarity may be
                given itself instead.
        """

    @abstractmethod
    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """Exact similarity (one minus the cosine distance) of pairs, `[M], [M] -> [M]` float64."""

    @abstractmethod
    def merge(self, left: Tensor, right: Tensor) -> None:
        """Merge disjoint pairs, `left < right`; the result is known by `left`."""

    @abstractmethod
    def within_reach(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """Whether the nearest may have at least the similarity `floor`, `[M], [M] -> [M]` bool."""

    def join(self, left: Tensor, right: Tensor) -> None:
        """Book-keeping of `merge`: update `alive` and `root`."""
        self.alive[right] = False
        self.root[right] = left
        self.root = self.root[self.root]  # `left` is alive, so one step leads there


def merge_rounds(clusters: Clusters, num_merges: int) -> Merges:
    """The lowest `num_merges` merges of each image's hierarchy, and usually some more.

    Args:
        clusters: one cluster per token.
        num_merges: N - K, in [1, N - 1].
    """
    count = clusters.num_tokens
    neighbour = clusters.first_neighbours()
    own_height = torch.zeros_like(neighbour, dtype=torch.float64)
    end_height = torch.full_like(own_height, torch.inf)  # of the merge into another cluster
    bound = end_height[::count].clone()
    made: list[Merges] = []
    while True:
        pairs = _reciprocal_pairs(clusters, neighbour, own_height, bound)
        if len(pairs.left) == 0:
            pairs = _tied_pairs(clusters, neighbour, own_height, bound)
        if len(pairs.left) == 0:
            return concatenate(made)
        made.append(pairs)
        left, right, height = pairs
        own_height[left] = end_height[right] = height
        bound = end_height.view(-1, count).kthvalue(num_merges, 1).values
        clusters.merge(left, right)
        neighbour[right] = right
        merged = torch.zeros_like(clusters.alive)
        merged.index_fill_(0, torch.cat((left, right)), True)
        stale = torch.where(clusters.alive & (merged[neighbour] | merged))[0]
        neighbour[stale] = clusters.neighbours(stale, 1 - bound[stale // count])


def _reciprocal_pairs(
    clusters: Clusters, neighbour: Tensor, own_height: Tensor, bound: Tensor
) -> Merges:
    """Pairs that are each other's nearest within `bound`; those farther are taken out of play."""
    everyone = torch.arange(len(neighbour), device=neighbour.device)
    left = torch.where((neighbour[neighbour] == everyone) & (everyone < neighbour))[0]
    right = neighbour[left]
    height = _height(clusters, left, right, own_height)
    low = height <= bound[left // clusters.num_tokens]
    if not bool(low.all()):
        neighbour[left[~low]] = left[~low]
        neighbour[right[~low]] = right[~low]
        left, right, height = left[low], right[low], height[low]
    return Merges(left, right, height)


def _tied_pairs(clusters: Clusters, neighbour: Tensor, own_height: Tensor, bound: Tensor) -> Merges:
    """What to merge when there is no reciprocal pair although something within `bound` is left.

    That takes rounding: a merged cluster is nearer to a third than its parts were, by the last bit,
    and clusters that practically tie are each other's nearest in a circle. The pairs of a cluster
    and its nearest of which no member is in a better such pair are merged; the best one is among
    them. (No image has a reciprocal pair then, so each goes on as if it were alone.)
    """
    everyone = torch.arange(len(neighbour), device=neighbour.device)
    row = torch.where(clusters.alive & (neighbour != everyone))[0]
    row_bound = bound[row // clusters.num_tokens]
    reached = clusters.within_reach(row, 1 - row_bound)
    row, row_bound = row[reached], row_bound[reached]
    other = neighbour[row]
    height = _height(clusters, row, other, own_height)
    low = height <= row_bound
    row, other, height = row[low], other[low], height[low]
    return best_disjoint_pairs(row, other, height, len(everyone), clusters.num_tokens)


def best_disjoint_pairs(
    row: Tensor, other: Tensor, height: Tensor, total: int, num_tokens: int
) -> Merges:
    """The pairs that are the best of all pairs that either member is in, by their lower members.

    Args:
        row: `[P]` int64, distinct.
        other: `[P]` int64, of the same image; unlike `row`, and no pair is given twice.
        height: `[P]` float64; equal ones are ranked by the XOR of their members' places.
        total: B * N, above all members.
        num_tokens: N.
    """
    distance = (row % num_tokens) ^ (other % num_tokens)
    lowest = height.new_full((total,), torch.inf)
    nearest = row.new_full((total,), torch.iinfo(torch.int64).max)
    for end in (row, other):
        lowest.scatter_reduce_(0, end, height, "amin")
    is_lowest = [height == lowest[end] for end in (row, other)]
    for end, best in zip((row, other), is_lowest, strict=True):
        nearest.scatter_reduce_(0, end[best], distance[best], "amin")
    chosen = is_lowest[0] & is_lowest[1]
    chosen &= (distance == nearest[row]) & (distance == nearest[other])
    row, other, height = row[chosen], other[chosen], height[chosen]
    left, order = torch.minimum(row, other).sort()
    return Merges(left, torch.maximum(row, other)[order], height[order])


def _height(clusters: Clusters, left: Tensor, right: Tensor, own_height: Tensor) -> Tensor:
    # rounding may put a merge below those of its parts by the last bit
    height = 1 - clusters.similarity(left, right)
    return torch.maximum(height, torch.maximum(own_height[left], own_height[right]))
