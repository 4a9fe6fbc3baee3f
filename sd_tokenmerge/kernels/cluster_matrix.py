"""The least similarities between clusters, as a matrix that follows their merges."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.ranking import lowest_of

_WASTE = 1.2  # from so many columns per cluster in play on, the others are thrown away


class ClusterMatrix:
    """Keys of each cluster with each, `[K, K]`; of those with what has left play, the lowest.

    Attributes:
        columns: `[K]` int64, the clusters.

    Args:
        columns: `[K]` int64.
        keys: `[K, K]`, kept and overwritten.
        num_tokens: N.
    """

    def __init__(self, columns: Tensor, keys: Tensor, num_tokens: int) -> None:
        self._keys = keys
        self._place = columns.new_zeros(num_tokens)
        self._name(columns)

    def _name(self, columns: Tensor) -> None:
        self.columns = columns
        self._place[columns] = torch.arange(len(columns), device=columns.device)

    def merge(self, left: Tensor, right: Tensor) -> None:
        """Make `left` the union of both, and take `right` out of play, `[P], [P]`."""
        left, right = self._place[left], self._place[right]
        least = torch.minimum(self._keys.index_select(0, left), self._keys.index_select(0, right))
        both = torch.minimum(least.index_select(1, left), least.index_select(1, right))
        least.index_copy_(1, left, both)
        self._keys.index_copy_(0, left, least)
        self._keys.index_copy_(1, left, least.T)
        self._keys.index_fill_(1, right, lowest_of(self._keys.dtype))

    def look_at(self, columns: Tensor) -> None:
        """Leave only these clusters in play, `[K']` int64."""
        places = self._place[columns]
        if len(self.columns) > _WASTE * len(columns):
            self._keys = self._keys.index_select(0, places).index_select(1, places)
            self._name(columns)
        else:
            left = torch.ones_like(self.columns, dtype=torch.bool)
            left[places] = False
            self._keys.index_fill_(1, torch.where(left)[0], lowest_of(self._keys.dtype))

    def rows(self, clusters: Tensor) -> Tensor:
        """Keys of some clusters, `[M] -> [M, K]`."""
        return self._keys.index_select(0, self._place[clusters])
