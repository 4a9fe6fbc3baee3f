"""Hierarchies by rounds of reciprocal nearest neighbours.

In a round, all pairs of clusters that are each other's nearest neighbour are merged at once. For a
reducible linkage, D(I + J, L) >= min(D(I, L), D(J, L)): merging a reciprocal pair brings no cluster
nearer to another, so the other pairs stay reciprocal, and the hierarchy is that of merging the
globally closest pair again and again (the nearest-neighbour chain of Benzecri and Juan, 1982; in
parallel: Sumengen et al., "Scaling hierarchical agglomerative clustering to billion-sized
datasets", 2021).

A cut at K clusters needs only the N - K lowest merges. As soon as that many have been made, the (N
- K)-th lowest of their heights is a limit: a cluster with a farther nearest neighbour is never
looked at again.

Each cluster keeps a short list of the most similar others and a bound on the similarity of all
others. By reducibility the bound stays true as others merge, and the larger bound of its
two parts holds for a new cluster. A cluster is searched for again only when its list no longer
proves which cluster is the nearest.

Ties: a cluster is known by its lowest token. Of several clusters at exactly the same distance, the
nearest is the one with the smallest XOR of both numbers. Two pairs with a common member
never tie, so nearest neighbours cannot form a cycle and every round merges at least one pair; and
tokens that all tie (duplicates, orthogonal vectors) form a balanced tree in log2(N) rounds, where
"the lowest number first" would chain them in N - 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import (
    best_by_id,
    best_of_pairs,
    rows_per_block,
    similarity_block,
)
from sd_tokenmerge.kernels.hierarchy import Merges, concatenate
from sd_tokenmerge.kernels.search import LIST_LENGTH, Lists, float32_error, precise_dtype
from sd_tokenmerge.kernels.vectors import UnitVectors

_PAIR_ELEMENTS = 1 << 17  # numbers of vectors compared pair by pair


class Clusters(ABC):
    """The clusters of one image's N tokens under a reducible linkage.

    A cluster is known by its lowest token. Similarity is one minus the distance.

    Attributes:
        num_tokens: N.
        device: of all tensors.
        error: largest error of the values of `search` and `estimate`.
    """

    def __init__(self, tokens: Tensor) -> None:
        """Start with one cluster per token.

        Args:
            tokens: `[N, C]`, any float dtype.

        Raises:
            ValueError: `tokens` are not finite.
        """
        self.num_tokens, channels = tokens.shape
        self.device = tokens.device
        self.error = float32_error(channels)
        self._pairs_at_once = max(1, _PAIR_ELEMENTS // channels)
        self._unit = UnitVectors(tokens)
        self._rounded = self._unit.rounded(precise_dtype(tokens.device))

    @abstractmethod
    def search(self, rows: Tensor, columns: Tensor) -> Lists:
        """List each row's most similar columns but itself, `[M], [N] -> [M, L]`.

        Args:
            rows: `[M]` int64 clusters; M is at least 1.
            columns: `[N]` int64 clusters, ascending, all rows among them. A cluster that is left
                out once is never given again.
        """

    @abstractmethod
    def estimate(self, clusters: Tensor, others: Tensor) -> Tensor:
        """Similarity of clusters to several others, `[M], [M, L] -> [M, L]`, within `error`.

        Others that have not been among the columns of all searches may be given -inf.
        """

    @abstractmethod
    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """Exact similarity of pairs, `[P], [P] -> [P]` float64."""

    @abstractmethod
    def vectors(self, clusters: Tensor) -> tuple[Tensor, Tensor]:
        """Exact vectors: the similarity of two clusters is the least one between their vectors.

        Returns:
            Places in `clusters`, `[T]` int64, ascending, and vectors, `[T, C]` float64.
        """

    @abstractmethod
    def merge(self, left: Tensor, right: Tensor) -> None:
        """Merge disjoint pairs, `[P], [P]`, `left < right`; the result is known by `left`."""


def merge_rounds(clusters: Clusters, num_merges: int) -> Merges:
    """The lowest `num_merges` merges of the hierarchy, and usually some more.

    Args:
        clusters: one cluster per token.
        num_merges: N - K, in [1, N - 1].
    """
    rounds = _Rounds(clusters)
    made: list[Merges] = []
    while len((pairs := rounds.closest_pairs()).left):
        made.append(pairs)
        rounds.merge(pairs, num_merges)
    return concatenate(made)


class _Rounds:
    """The state of each cluster between two rounds; all tensors are indexed by token, `[N]`."""

    def __init__(self, clusters: Clusters) -> None:
        self._clusters = clusters
        self._everyone = torch.arange(clusters.num_tokens, device=clusters.device)
        self._alive = torch.ones_like(self._everyone, dtype=torch.bool)
        self._dormant = torch.zeros_like(self._alive)  # has nothing within `_limit`
        self._root = self._everyone.clone()
        self._own_height = torch.zeros_like(self._everyone, dtype=torch.float64)
        self._end_height = torch.full_like(self._own_height, torch.inf)  # of the merge into another
        self._limit = self._end_height[0]
        self._listed = self._everyone.new_zeros(len(self._everyone), LIST_LENGTH)
        self._bound = torch.zeros_like(self._own_height)  # on all that are not listed
        self._upper = torch.zeros_like(self._own_height)  # on the nearest
        self._neighbour = self._everyone.clone()  # itself if there is none
        self._search(self._everyone)

    def closest_pairs(self) -> Merges:
        """Pairs to merge at once; none if nothing is left within the limit."""
        pairs = self._reciprocal_pairs()
        return pairs if len(pairs.left) else self._tied_pairs()

    def merge(self, pairs: Merges, num_merges: int) -> None:
        """Merge pairs, lower the limit and find the new nearest neighbours."""
        left, right, height = pairs
        self._own_height[left] = self._end_height[right] = height
        self._limit = self._end_height.kthvalue(num_merges).values
        self._clusters.merge(left, right)
        self._alive[right] = False
        self._root[right] = left
        self._root = self._root[self._root]  # `left` is alive, so one step leads there
        merged = torch.zeros_like(self._alive)
        merged[left] = merged[right] = True
        partner = self._everyone.clone()
        partner[left] = right
        self._neighbour[right] = right
        stale = torch.where(self._alive & (merged | merged[self._neighbour]))[0]
        unproven = self._look_up(stale, partner[stale])
        if len(unproven):
            self._search(unproven)

    def _reciprocal_pairs(self) -> Merges:
        """Pairs that are each other's nearest; those beyond the limit are taken out of play."""
        is_mutual = self._neighbour[self._neighbour] == self._everyone
        left = torch.where(is_mutual & (self._everyone < self._neighbour))[0]
        right = self._neighbour[left]
        height = self._height(left, right)
        low = height <= self._limit
        self._neighbour[left[~low]] = left[~low]
        self._neighbour[right[~low]] = right[~low]
        return Merges(left[low], right[low], height[low])

    def _tied_pairs(self) -> Merges:
        """Pairs to merge if none is reciprocal although clusters within the limit are left.

        Only rounding causes this: a merged cluster is nearer to a third than its parts were, by the
        last bit, so the nearest neighbours of clusters that practically tie form a cycle. Merge
        each (cluster, nearest) pair that beats every other pair sharing a member; the best pair is
        among them.
        """
        in_play = self._alive & (self._neighbour != self._everyone)
        row = torch.where(in_play & (self._upper >= 1 - self._limit))[0]
        other = self._neighbour[row]
        height = self._height(row, other)
        low = height <= self._limit
        return best_disjoint_pairs(row[low], other[low], height[low], len(self._everyone))

    def _height(self, left: Tensor, right: Tensor) -> Tensor:
        # rounding may put a merge below those of its parts by the last bit
        height = 1 - self._clusters.similarity(left, right)
        return torch.maximum(height, torch.maximum(self._own_height[left], self._own_height[right]))

    def _look_up(self, rows: Tensor, partners: Tensor) -> Tensor:
        """Find each row's nearest cluster among those that it or its partner has listed.

        Args:
            rows: `[M]` int64.
            partners: `[M]` int64, the cluster that each was just merged with, or itself.

        Returns:
            The rows that the lists do not prove it for.
        """
        listed = self._root[torch.cat((self._listed[rows], self._listed[partners]), 1)]
        value = self._clusters.estimate(rows, listed)
        value = value.masked_fill(_repeated(listed) | (listed == rows.unsqueeze(1)), -torch.inf)
        best, place = value.topk(LIST_LENGTH + 1, 1)
        bound = torch.maximum(self._bound[rows], self._bound[partners])
        bound = torch.maximum(bound, best[:, -1].double() + self._clusters.error)
        return self._choose(rows, Lists(listed.gather(1, place[:, :-1]), best[:, :-1], bound))

    def _search(self, rows: Tensor) -> None:
        columns = torch.where(self._alive & ~self._dormant)[0]
        unproven = self._choose(rows, self._clusters.search(rows, columns))
        if len(unproven):
            self._neighbour[unproven] = self._nearest_exactly(unproven, columns)

    def _choose(self, rows: Tensor, lists: Lists) -> Tensor:
        """Store lists and the nearest clusters that they prove; return the rows without proof."""
        error = self._clusters.error
        self._listed[rows], self._bound[rows] = lists.column, lists.bound
        highest, place = lists.value.max(1, keepdim=True)
        nearest = lists.column.gather(1, place).squeeze(1)
        best = highest.squeeze(1).double()
        upper = torch.maximum(best + error, lists.bound)
        hopeless = (upper < 1 - self._limit) | (upper == -torch.inf)
        beaten = best - error <= lists.bound
        close = lists.value.double() >= (best - 2 * error).unsqueeze(1)
        tied = torch.where((close.sum(1) > 1) & ~beaten & ~hopeless)[0]
        if len(tied):
            row, nth = torch.where(close[tied])
            others = lists.column[tied][row, nth]
            exact = self._clusters.similarity(rows[tied][row], others)
            nearest[tied] = best_of_pairs(exact, row, rows[tied], others)
        self._upper[rows] = upper
        self._dormant[rows] = hopeless
        self._neighbour[rows] = torch.where(hopeless, rows, nearest)
        return rows[beaten & ~hopeless]

    def _nearest_exactly(self, rows: Tensor, columns: Tensor) -> Tensor:
        """The nearest column of each row by exact similarities to all, `[M], [N] -> [M]`."""
        column_place, column_vectors = self._clusters.vectors(columns)
        found = []
        for part in torch.split(rows, rows_per_block(len(columns))):
            least = column_vectors.new_full((len(part), len(columns)), torch.inf)
            place, vectors = self._clusters.vectors(part)
            step = rows_per_block(len(column_vectors))
            for row, some in zip(torch.split(place, step), torch.split(vectors, step), strict=True):
                exact = similarity_block(some, column_vectors)
                by_column = least.new_full((len(some), len(columns)), torch.inf)
                by_column.scatter_reduce_(1, column_place.expand_as(exact), exact, "amin")
                least.scatter_reduce_(0, row.unsqueeze(1).expand_as(by_column), by_column, "amin")
            found.append(best_by_id(least, part, columns))
        return torch.cat(found)


def best_disjoint_pairs(row: Tensor, other: Tensor, height: Tensor, num_tokens: int) -> Merges:
    """The pairs that beat every other pair sharing a member, by their lower members.

    Args:
        row: `[P]` int64, distinct.
        other: `[P]` int64, unlike `row`; no pair is given twice.
        height: `[P]` float64; equal ones are ranked by the XOR of their members.
        num_tokens: N, above all members.
    """
    distance = row ^ other
    lowest = height.new_full((num_tokens,), torch.inf)
    nearest = row.new_full((num_tokens,), torch.iinfo(torch.int64).max)
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


def _repeated(listed: Tensor) -> Tensor:
    """Which entries of each row repeat an earlier one, `[M, L] -> [M, L]` bool."""
    return (listed.unsqueeze(2) == listed.unsqueeze(1)).tril_(-1).any(2)
