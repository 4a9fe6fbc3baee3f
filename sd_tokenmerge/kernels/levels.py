"""Minima over the tokens of clusters, as few operations on long contiguous blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.members import Members

_LEVELS = 32


class Levels:
    """The tokens of clusters: the first of each, then the second of each that has one, and so on.

    A level's tokens are those of the first so many clusters, as the largest come first. So the
    minimum over all tokens of each cluster is that of some contiguous blocks. What the largest
    clusters have beyond the last level follows, cluster by cluster.

    Attributes:
        tokens: `[P]` int64, all of them.

    Args:
        clusters: `[K]` int64, by descending size.
        members: of the clusters.
    """

    def __init__(self, clusters: Tensor, members: Members) -> None:
        self._num_clusters = len(clusters)
        sizes = members.sizes[clusters]
        above = torch.arange(_LEVELS + 1, device=sizes.device).unsqueeze(1)
        counts = (sizes > above).sum(1).tolist()
        self._levels = [count for count in counts[:-1] if count]
        large = clusters[: counts[-1]]
        self._others = (sizes[: counts[-1]] - _LEVELS).tolist()
        tokens = [members.nth(clusters[:count], level) for level, count in enumerate(self._levels)]
        self.tokens = torch.cat((*tokens, members.expand(large, _LEVELS)[1]))

    def least(self, values: Tensor, dim: int) -> Tensor:
        """Minimum over each cluster's tokens; overwrites `values`, and is a view of them.

        Args:
            values: P of them along a dimension.
            dim: which one; K values are left.
        """
        first, *parts = torch.split(values, self._levels + self._others, dim)
        for part in parts[: len(self._levels) - 1]:
            same = first.narrow(dim, 0, part.shape[dim])
            torch.minimum(same, part, out=same)
        for place, part in enumerate(parts[len(self._levels) - 1 :]):
            same = first.select(dim, place)
            torch.minimum(same, part.amin(dim), out=same)
        return first
