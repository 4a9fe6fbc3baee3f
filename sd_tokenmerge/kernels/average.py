"""Average linkage on cosine distance, without a distance matrix.

With unit tokens u, the mean distance between the members of two clusters is one minus the dot
product of their mean vectors, D(I, J) = 1 - mean(u in I) . mean(u in J): a cluster is its vector
sum and its size.

Each cluster keeps a short list of the most similar others and a bound on the similarity of all that
are not listed. Merging brings no cluster nearer to another, so the bound stays true as others
merge; for a new cluster, the mean of its parts' bounds (weighted by size) holds for all that
neither part listed. A cluster is searched for again only when its list no longer proves which is
the nearest.

Lists take many calls on short arrays. Once so few clusters are left that a product takes less time,
there are none: each search looks at all clusters in play.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.batches import all_candidates, batch_lists, first_lists
from sd_tokenmerge.kernels.cluster_means import ClusterMeans
from sd_tokenmerge.kernels.exact import best_of_pairs, nearest_exact, pair_similarities
from sd_tokenmerge.kernels.rounds import Clusters
from sd_tokenmerge.kernels.search import LIST_LENGTH, blocks, float32_error

# multiplications of a product of all clusters of an image with each other, from which on lists pay
_FEW_PRODUCTS = 1 << 26
_PAIR_ELEMENTS = 1 << 17  # of vectors compared pair by pair


class AverageClusters(Clusters):
    """Clusters under average linkage.

    Args:
        tokens: `[B, N, C]`, any float dtype.
        search_dtype: see `nearest_lists`; small images are searched in `precise_dtype`.
    """

    def __init__(self, tokens: Tensor, search_dtype: torch.dtype) -> None:
        batch, num_tokens, channels = tokens.shape
        super().__init__(batch, num_tokens, tokens.device)
        total = batch * num_tokens
        self._means = ClusterMeans(tokens.flatten(0, 1))
        self._search_dtype = search_dtype
        self._error = float32_error(channels)
        self._dormant = torch.zeros_like(self.alive)
        self._listed = self.root.new_zeros(total, LIST_LENGTH)
        self._value = self._means.rounded.new_zeros(total, LIST_LENGTH)
        self._bound = self._means.size.new_zeros(total)
        self._time = 0
        self._merged_at = torch.zeros_like(self.root)
        self._listed_at = torch.zeros_like(self.root)
        self._without_lists = False

    def first_neighbours(self) -> Tensor:
        """See `Clusters`."""
        if self._are_few():
            return self._choose_of_all(self.root, torch.full_like(self._bound, -torch.inf))
        lists = first_lists(self._by_image(self._means.rounded), self._search_dtype)
        self._listed, self._value, self._bound = lists
        no_floor = torch.full_like(self._bound, -torch.inf)
        return self._choose(self.root, no_floor, searched=True)

    def neighbours(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """See `Clusters`."""
        if self._are_few():
            return self._choose_of_all(clusters, floor)
        self._update(clusters[self._listed_at[clusters] < self._time])
        return self._choose(clusters, floor, searched=False)

    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Clusters`."""
        self._means.keep(torch.cat((left, right)))
        step = max(1, _PAIR_ELEMENTS // self._means.rounded.shape[1])
        found = [
            pair_similarities(self._means.exact(one), self._means.exact(other))
            for one, other in blocks(step, left, right)
        ]
        return torch.cat(found)

    def merge(self, left: Tensor, right: Tensor) -> None:
        """See `Clusters`."""
        self._means.merge(left, right)
        self.join(left, right)
        if not self._without_lists:
            self._merge_lists(left, right)

    def _merge_lists(self, left: Tensor, right: Tensor) -> None:
        """The lists and bounds of merged pairs, now known by `left`."""
        self._time += 1
        self._merged_at[left] = self._merged_at[right] = self._time
        listed = self.root[torch.cat((self._listed[left], self._listed[right]), 1)]
        value = self._similarities(left, listed)
        value.masked_fill_(_repeated(listed) | (listed == left.unsqueeze(1)), -torch.inf)
        best, place = value.topk(LIST_LENGTH + 1, 1)
        self._listed[left] = listed.gather(1, place[:, :-1])
        self._value[left] = best[:, :-1]
        self._listed_at[left] = self._time
        size, right_size = self._means.size[left], self._means.size[right]
        shares = self._bound[left] * (size - right_size) + self._bound[right] * right_size
        unlisted = best[:, -1].double() + self._error
        self._bound[left] = torch.maximum(shares / size, unlisted)

    def within_reach(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """See `Clusters`."""
        if self._without_lists:
            return torch.ones_like(clusters, dtype=torch.bool)
        listed = self._value[clusters].amax(1).double() + self._error
        return torch.maximum(listed, self._bound[clusters]) >= floor

    def _update(self, clusters: Tensor) -> None:
        """Bring lists up to date: similarities to what the listed clusters are now part of."""
        former = self._listed[clusters]
        listed = self.root[former]
        value = self._value[clusters]
        row, place = torch.where(self._merged_at[former] > self._listed_at[clusters].unsqueeze(1))
        value[row, place] = self._products(clusters[row], listed[row, place])
        value.masked_fill_(_repeated(listed) | (listed == clusters.unsqueeze(1)), -torch.inf)
        self._listed[clusters] = listed
        self._value[clusters] = value
        self._listed_at[clusters] = self._time

    def _similarities(self, clusters: Tensor, others: Tensor) -> Tensor:
        """Of each cluster with its others, within `_error`, `[M], [M, L] -> [M, L]`."""
        vectors = self._means.rounded
        step = max(1, _PAIR_ELEMENTS // (others.shape[1] * vectors.shape[1]))
        found = []
        for part, listed in blocks(step, clusters, others):
            value = vectors.index_select(0, listed.flatten()).view(*listed.shape, -1)
            found.append(value.mul_(vectors.index_select(0, part).unsqueeze(1)).sum(2))
        return torch.cat(found)

    def _products(self, left: Tensor, right: Tensor) -> Tensor:
        """Similarities of pairs, within `_error`, `[P], [P] -> [P]`."""
        vectors = self._means.rounded
        step = max(1, _PAIR_ELEMENTS // vectors.shape[1])
        found = [
            vectors.index_select(0, one).mul_(vectors.index_select(0, other)).sum(1)
            for one, other in blocks(step, left, right)
        ]
        return torch.cat(found)

    def _by_image(self, values: Tensor) -> Tensor:
        return values.view(-1, self.num_tokens, *values.shape[1:])

    def _choose(self, clusters: Tensor, floor: Tensor, *, searched: bool) -> Tensor:
        """The nearest clusters where the lists prove them; the others are searched for."""
        value, place = self._value[clusters].double().topk(2, 1)
        best, second, bound = value[:, 0], value[:, 1], self._bound[clusters]
        nearest = self._listed[clusters, place[:, 0]]
        highest = torch.maximum(best + self._error, bound)
        hopeless = (highest < floor) | (highest == -torch.inf)
        nearest = torch.where(hopeless, clusters, nearest)
        self._dormant[clusters] = hopeless
        lowest = best - self._error
        unproven = ~hopeless & (lowest <= torch.maximum(second + self._error, bound))
        is_listed = lowest > bound
        close = torch.where(unproven & is_listed)[0]
        if len(close):
            nearest[close] = self._nearest_listed(clusters[close])
        unlisted = torch.where(unproven & ~is_listed)[0]
        if len(unlisted):
            again = clusters[unlisted]
            nearest[unlisted] = (
                self._nearest_of_all(again) if searched else self._search(again, floor[unlisted])
            )
        return nearest

    def _search(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """Nearest cluster of the given ones, and new lists for them."""
        columns = torch.where(self.alive & ~self._dormant)[0]
        means = self._by_image(self._means.rounded)
        lists = batch_lists(means, clusters, columns, self._search_dtype)
        self._listed[clusters], self._value[clusters], self._bound[clusters] = lists
        self._listed_at[clusters] = self._time
        return self._choose(clusters, floor, searched=True)

    def _are_few(self) -> bool:
        """Whether so few clusters are in play that lists cost more than they save, from now on."""
        if not self._without_lists:
            most = int(self._by_image(self.alive & ~self._dormant).sum(1).max())
            self._without_lists = most**2 * self._means.rounded.shape[1] <= _FEW_PRODUCTS
        return self._without_lists

    def _choose_of_all(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """The nearest of all clusters in play, compared exactly where several are close."""
        if len(clusters) == 0:
            return clusters
        columns = torch.where(self.alive & ~self._dormant)[0]
        highest, row, other = all_candidates(self._by_image(self._means.rounded), clusters, columns)
        hopeless = (highest < floor) | (highest == -torch.inf)
        self._dormant[clusters] = hopeless
        nearest = clusters.clone()
        nearest[row] = other
        count = torch.bincount(row, minlength=len(clusters))
        if not bool((count == 1).all()):
            several = (count > 1) & ~hopeless
            pair = torch.where(several[row])[0]
            if len(pair):
                close = torch.where(several)[0]
                place = torch.searchsorted(close, row[pair])
                nearest[close] = self._best(clusters[close], place, other[pair])
            many = torch.where((count == 0) & ~hopeless)[0]
            if len(many):
                nearest[many] = self._nearest_of_all(clusters[many])
        return torch.where(hopeless, clusters, nearest)

    def _nearest_listed(self, clusters: Tensor) -> Tensor:
        """Nearest cluster among the listed ones, by exact similarities where it is close."""
        value = self._value[clusters]
        row, place = torch.where(value >= value.amax(1, keepdim=True) - 2 * self._error)
        return self._best(clusters, row, self._listed[clusters[row], place])

    def _best(self, clusters: Tensor, row: Tensor, others: Tensor) -> Tensor:
        """Nearest of the others given for each cluster, by places in `clusters`, exactly."""
        exact = self.similarity(clusters[row], others)
        first = clusters - clusters % self.num_tokens
        return first + best_of_pairs(exact, row, clusters - first, others - first[row])

    def _nearest_of_all(self, clusters: Tensor) -> Tensor:
        """Nearest cluster of the given ones by exact similarities to all."""
        nearest = torch.empty_like(clusters)
        image = clusters // self.num_tokens
        for number in torch.unique(image).tolist():
            first = number * self.num_tokens
            here = torch.where(image == number)[0]
            in_play = self._by_image(self.alive & ~self._dormant)[number]
            columns = torch.where(in_play)[0]
            rows, means = self._means.exact(clusters[here]), self._means.exact(first + columns)
            nearest[here] = first + nearest_exact(rows, clusters[here] - first, means, columns)
        return nearest


def _repeated(listed: Tensor) -> Tensor:
    """Which entries of each row repeat an earlier one, `[M, L] -> [M, L]` bool."""
    return (listed.unsqueeze(2) == listed.unsqueeze(1)).tril_(-1).any(2)
