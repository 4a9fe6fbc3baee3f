"""Average linkage on cosine distance, without a distance matrix.

With unit tokens u, the mean distance between the members of two clusters is one minus the dot
product of their mean vectors, D(I, J) = 1 - mean(u in I) . mean(u in J): a cluster is its vector
sum and its size.

Each cluster keeps a short list of the most similar others and a bound on the similarity of all that
are not listed. Merging brings no cluster nearer to another, so the bound stays true as others
merge; for a new cluster, the mean of its parts' bounds (weighted by size) holds for all that
neither part listed. A cluster is searched for again only when its list no longer proves which is
the nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import best_of_pairs, nearest_exact, pair_similarities
from sd_tokenmerge.kernels.rounds import Clusters
from sd_tokenmerge.kernels.search import (
    LIST_LENGTH,
    Lists,
    float32_error,
    nearest_lists,
    precise_dtype,
)


class AverageClusters(Clusters):
    """Clusters under average linkage.

    Args:
        unit: `[N, C]` float64 unit vectors; overwritten.
        search_dtype: see `nearest_lists`.
    """

    def __init__(self, unit: Tensor, search_dtype: torch.dtype) -> None:
        super().__init__(len(unit), unit.device)
        self._sum = unit
        self._size = unit.new_ones(len(unit))
        self._mean = unit.to(precise_dtype(unit.device))
        self._search_dtype = search_dtype
        self._error = float32_error(unit.shape[1])
        self._dormant = torch.zeros_like(self.alive)
        self._listed = self.root.new_zeros(len(unit), LIST_LENGTH)
        self._bound = unit.new_zeros(len(unit))

    def first_neighbours(self) -> Tensor:
        """See `Clusters`."""
        return self._search(self.root.clone(), torch.tensor(-torch.inf, device=self.root.device))

    def neighbours(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """See `Clusters`."""
        lists = self._evaluate(clusters, self._listed[clusters])
        return self._choose(clusters, lists, floor, searched=False)

    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Clusters`."""
        return pair_similarities(self._exact_mean(left), self._exact_mean(right))

    def merge(self, left: Tensor, right: Tensor) -> None:
        """See `Clusters`."""
        left_size, right_size = self._size[left], self._size[right]
        bound = self._bound[left] * left_size + self._bound[right] * right_size
        self._sum[left] += self._sum[right]
        self._size[left] = left_size + right_size
        self._mean[left] = self._exact_mean(left).to(self._mean.dtype)
        self.join(left, right)
        self._bound[left] = bound / self._size[left]
        both = self._evaluate(left, torch.cat((self._listed[left], self._listed[right]), 1))
        best, place = both.value.topk(LIST_LENGTH + 1, 1)
        self._listed[left] = both.column.gather(1, place[:, :-1])
        self._bound[left] = torch.maximum(self._bound[left], best[:, -1].double() + self._error)

    def _exact_mean(self, clusters: Tensor) -> Tensor:
        return self._sum[clusters] / self._size[clusters].unsqueeze(1)

    def _evaluate(self, clusters: Tensor, listed: Tensor) -> Lists:
        """Similarities to the clusters that the listed ones are now part of, each once."""
        index = self.root[listed]
        value = (self._mean[index] * self._mean[clusters].unsqueeze(1)).sum(2)
        earlier = torch.ones(index.shape[1], index.shape[1], device=index.device).tril(-1).bool()
        repeated = ((index.unsqueeze(2) == index.unsqueeze(1)) & earlier).any(2)
        value.masked_fill_(repeated | (index == clusters.unsqueeze(1)), -torch.inf)
        return Lists(index, value, self._bound[clusters])

    def _choose(self, clusters: Tensor, lists: Lists, floor: Tensor, *, searched: bool) -> Tensor:
        """The nearest clusters where the lists prove them; the others are searched for."""
        value, place = lists.value.double().topk(2, 1)
        best, second, bound = value[:, 0], value[:, 1], lists.bound.double()
        nearest = lists.column.gather(1, place[:, :1]).squeeze(1)
        highest = torch.maximum(best + self._error, bound)
        hopeless = (highest < floor) | (highest == -torch.inf)
        nearest = torch.where(hopeless, clusters, nearest)
        self._dormant[clusters[hopeless]] = True
        lowest = best - self._error
        unproven = ~hopeless & (lowest <= torch.maximum(second + self._error, bound))
        is_listed = lowest > bound
        close = torch.where(unproven & is_listed)[0]
        if len(close):
            nearest[close] = self._nearest_listed(
                clusters[close], Lists(*(x[close] for x in lists))
            )
        unlisted = torch.where(unproven & ~is_listed)[0]
        if len(unlisted):
            again = clusters[unlisted]
            nearest[unlisted] = (
                self._nearest_of_all(again) if searched else self._search(again, floor)
            )
        return nearest

    def _search(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """Nearest cluster of the given ones, and new lists for them."""
        columns = torch.where(self.alive & ~self._dormant)[0]
        own = torch.searchsorted(columns, clusters)
        lists = nearest_lists(self._mean[clusters], self._mean[columns], own, self._search_dtype)
        lists = lists._replace(column=columns[lists.column])
        self._listed[clusters] = lists.column
        self._bound[clusters] = lists.bound
        return self._choose(clusters, lists, floor, searched=True)

    def _nearest_listed(self, clusters: Tensor, lists: Lists) -> Tensor:
        """Nearest cluster among the listed ones, by exact similarities where it is close."""
        row, place = torch.where(lists.value >= lists.value.amax(1, keepdim=True) - 2 * self._error)
        others = lists.column[row, place]
        return best_of_pairs(self.similarity(clusters[row], others), row, clusters, others)

    def _nearest_of_all(self, clusters: Tensor) -> Tensor:
        """Nearest cluster of the given ones by exact similarities to all."""
        columns = torch.where(self.alive & ~self._dormant)[0]
        means = self._exact_mean(columns)
        return nearest_exact(self._exact_mean(clusters), clusters, means, columns)
