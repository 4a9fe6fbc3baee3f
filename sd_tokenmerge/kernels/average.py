"""Average linkage on cosine distance, without a distance matrix.

With unit tokens u, the mean distance between the members of two clusters is one minus the dot
product of their mean vectors, D(I, J) = 1 - mean(u in I) . mean(u in J): a cluster is its vector
sum and its size. Memory is O(N C): the means of all clusters in float32, and the float64 sums of
clusters of several tokens. The exact mean of a single token is computed when it is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import pair_similarities
from sd_tokenmerge.kernels.rounds import Clusters
from sd_tokenmerge.kernels.search import Lists, mutual_lists, nearest_lists
from sd_tokenmerge.kernels.vectors import blocks


class AverageClusters(Clusters):
    """Clusters under average linkage; see `Clusters`."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__(tokens)
        self._means = self._rounded
        self._size = tokens.new_ones(len(tokens), dtype=torch.float64)
        self._sums = tokens.new_empty(0, tokens.shape[1], dtype=torch.float64)
        self._place = torch.full((len(tokens),), -1, device=tokens.device)  # in `_sums`

    def search(self, rows: Tensor, columns: Tensor) -> Lists:
        """See `Clusters`."""
        if len(rows) == self.num_tokens:
            return mutual_lists(self._means)
        return nearest_lists(self._means, rows, columns)

    def estimate(self, clusters: Tensor, others: Tensor) -> Tensor:
        """See `Clusters`."""
        count = others.shape[1]
        found = []
        for some, listed in blocks(max(1, self._pairs_at_once // count), clusters, others):
            means = self._means.index_select(0, listed.flatten()).view(*listed.shape, -1)
            found.append(means.mul_(self._means.index_select(0, some).unsqueeze(1)).sum(2))
        return torch.cat(found)

    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Clusters`."""
        found = [
            pair_similarities(self._exact(one), self._exact(other))
            for one, other in blocks(self._pairs_at_once, left, right)
        ]
        return torch.cat(found)

    def vectors(self, clusters: Tensor) -> tuple[Tensor, Tensor]:
        """See `Clusters`."""
        return torch.arange(len(clusters), device=self.device), self._exact(clusters)

    def merge(self, left: Tensor, right: Tensor) -> None:
        """See `Clusters`."""
        place = torch.maximum(self._place[left], self._place[right])
        new = torch.where(place < 0)[0]
        place[new] = torch.arange(len(new), device=self.device).add_(len(self._sums))
        self._sums = torch.cat((self._sums, self._sums.new_empty(len(new), self._sums.shape[1])))
        size = self._size[left] + self._size[right]
        everything = torch.arange(len(left), device=self.device)
        for some in torch.split(everything, self._pairs_at_once):
            total = self._sum(left[some]).add_(self._sum(right[some]))
            self._sums[place[some]] = total
            self._means[left[some]] = total.div_(size[some].unsqueeze(1)).to(self._means.dtype)
        self._place[left] = place
        self._size[left] = size

    def _exact(self, clusters: Tensor) -> Tensor:
        """Mean vectors, `[M] -> [M, C]` float64."""
        return self._sum(clusters).div_(self._size[clusters].unsqueeze(1))

    def _sum(self, clusters: Tensor) -> Tensor:
        """Vector sums, `[M] -> [M, C]` float64."""
        place = self._place[clusters]
        is_single = place < 0
        if bool(is_single.all()):
            return self._unit.exact(clusters)
        sums = self._sums.index_select(0, place.clamp_(min=0))
        single = torch.where(is_single)[0]
        sums[single] = self._unit.exact(clusters[single])
        return sums
