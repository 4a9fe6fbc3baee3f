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
    """The clusters of one image under some linkage; a cluster is known by its lowest token.

    Attributes:
        alive: `[N]` bool; which tokens name a cluster.
        root: `[N]` int64; the cluster each token is in.
    """

    def __init__(self, num_tokens: int, device: torch.device) -> None:
        self.alive = torch.ones(num_tokens, dtype=torch.bool, device=device)
        self.root = torch.arange(num_tokens, device=device)

    @abstractmethod
    def first_neighbours(self) -> Tensor:
        """Nearest other cluster of every token, `[N]` int64; N is at least 2."""

    @abstractmethod
    def neighbours(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """Nearest other cluster of the given ones, `[M] -> [M]` int64.

        Args:
            clusters: `[M]` int64, alive; those whose former nearest neighbour was merged, and new
                ones.
            floor: float64 scalar; a cluster without any other of at least this similarity may be
                given itself instead.
        """

    @abstractmethod
    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """Exact similarity (one minus the cosine distance) of pairs, `[M], [M] -> [M]` float64."""

    @abstractmethod
    def merge(self, left: Tensor, right: Tensor) -> None:
        """Merge disjoint pairs, `left < right`; the result is known by `left`."""

    def join(self, left: Tensor, right: Tensor) -> None:
        """Book-keeping of `merge`: update `alive` and `root`."""
        self.alive[right] = False
        self.root[right] = left
        self.root = self.root[self.root]  # `left` is alive, so one step leads there


def merge_rounds(clusters: Clusters, num_merges: int) -> Merges:
    """The lowest `num_merges` merges of the hierarchy, and usually some more.

    Args:
        clusters: one cluster per token.
        num_merges: N - K, in [1, N - 1].
    """
    device = clusters.alive.device
    everyone = torch.arange(len(clusters.alive), device=device)
    own_height = torch.zeros(len(everyone), dtype=torch.float64, device=device)
    bound = torch.tensor(torch.inf, dtype=torch.float64, device=device)
    neighbour = clusters.first_neighbours()
    made: list[Merges] = []
    while True:
        left = torch.where((neighbour[neighbour] == everyone) & (everyone < neighbour))[0]
        right = neighbour[left]
        # rounding may put a merge below its children's by the last bit
        height = 1 - clusters.similarity(left, right)
        height = torch.maximum(height, torch.maximum(own_height[left], own_height[right]))
        low = height <= bound
        neighbour[left[~low]] = left[~low]
        neighbour[right[~low]] = right[~low]
        left, right, height = left[low], right[low], height[low]
        if len(left) == 0:
            return concatenate(made)
        made.append(Merges(left, right, height))
        own_height[left] = height
        heights = torch.cat([merges.height for merges in made])
        if len(heights) >= num_merges:
            bound = heights.kthvalue(num_merges).values
        clusters.merge(left, right)
        neighbour[right] = right
        merged = torch.zeros_like(clusters.alive)
        merged[left] = merged[right] = True
        stale = torch.where(clusters.alive & (merged[neighbour] | merged))[0]
        neighbour[stale] = clusters.neighbours(stale, 1 - bound)
