"""The mean unit vectors of clusters: rounded for searches, exact for decisions.

Kept in float64, they would take twice the memory of float32 tokens. So a cluster of one token is
that token's unit vector, computed when it is needed, and only clusters of several have a sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import unit_vectors
from sd_tokenmerge.kernels.search import blocks, precise_dtype
from sd_tokenmerge.kernels.unit_rows import FEW_CHANNELS, UnitRows

_KEPT_AT_ONCE = 1024


class ClusterMeans:
    """Means by cluster; a cluster is known by its lowest token.

    Attributes:
        rounded: `[N, C]` in `precise_dtype`; only the rows of clusters have a meaning.
        size: `[N]` float64, tokens in each cluster.

    Args:
        tokens: `[N, C]`, any float dtype. Each is a cluster of its own at first.

    Raises:
        ValueError: `tokens` are not finite.
    """

    def __init__(self, tokens: Tensor) -> None:
        count, channels = tokens.shape
        precise = precise_dtype(tokens.device)
        self._keeps_all = channels <= FEW_CHANNELS
        if self._keeps_all:
            self._sums = unit_vectors(tokens)
            self._place = torch.arange(count, device=tokens.device)  # of clusters in `_sums`
            self.rounded = self._sums.to(precise, copy=True)
        else:
            self._unit = UnitRows(tokens)
            self._sums = self._unit.exact(torch.arange(0, device=tokens.device))
            self._place = torch.full((count,), -1, device=tokens.device)
            self.rounded = self._unit.rounded(precise)
        self.size = self._sums.new_ones(count)
        self._free = self._place[:0]  # places in `_sums` that no cluster has

    def exact(self, clusters: Tensor) -> Tensor:
        """The means of some clusters, `[M] -> [M, C]` float64."""
        place = self._place[clusters]
        if self._keeps_all or bool((place >= 0).all()):
            sums = self._sums.index_select(0, place)
            return sums.div_(self.size[clusters].unsqueeze(1))
        means = self._unit.exact(clusters)
        kept = torch.where(place >= 0)[0]
        if len(kept):
            means[kept] = self.exact(clusters[kept])
        return means

    def keep(self, clusters: Tensor) -> None:
        """Keep what `exact` needs of some clusters, until they are merged into another."""
        if self._keeps_all:
            return
        single = clusters[self._place[clusters] < 0]
        if len(single):
            single = torch.unique(single)
            missing = len(single) - len(self._free)
            if missing > 0:
                count, channels = self._sums.shape
                self._sums = torch.cat((self._sums, self._sums.new_empty(missing, channels)))
                more = torch.arange(count, count + missing, device=single.device)
                self._free = torch.cat((self._free, more))
            place, self._free = self._free[: len(single)], self._free[len(single) :]
            self._place[single] = place
            for into, some in blocks(_KEPT_AT_ONCE, place, single):
                self._sums[into] = self._unit.exact(some)

    def merge(self, left: Tensor, right: Tensor) -> None:
        """Merge disjoint pairs, `[P], [P]`; the result is known by `left`."""
        self.keep(torch.cat((left, right)))
        place, former = self._place[left], self._place[right]
        self._sums.index_add_(0, place, self._sums.index_select(0, former))
        self.size.index_add_(0, left, self.size[right])
        self._free = torch.cat((self._free, former))
        self.rounded[left] = self.exact(left).to(self.rounded.dtype)
