"""Which tokens are in which cluster, as sorted runs."""

from __future__ import annotations

import torch
from torch import Tensor


class Members:
    """Tokens sorted by cluster.

    Attributes:
        sizes: `[N]` int64, of the clusters.
        are_tokens: whether every cluster has only one.

    Args:
        root: `[N]` int64, the cluster of each token.
    """

    def __init__(self, root: Tensor) -> None:
        self._tokens = torch.argsort(root, stable=True)
        self.sizes = torch.bincount(root, minlength=len(root))
        self.are_tokens = int(self.sizes.amax()) == 1
        self._first = self.sizes.cumsum(0) - self.sizes

    def expand(self, clusters: Tensor, skipped: int = 0) -> tuple[Tensor, Tensor]:
        """All tokens of clusters but the first few, `[M] -> [P], [P]`: place in `clusters`, token.

        Args:
            clusters: `[M]` int64.
            skipped: how many of each are left out; each must have that many.
        """
        place, nth = expand(self.sizes[clusters] - skipped)
        return place, self._tokens[self._first[clusters[place]] + nth + skipped]

    def nth(self, clusters: Tensor, number: int | Tensor) -> Tensor:
        """The `number`-th token of each cluster, `[M] -> [M]`; each must have that many."""
        return self._tokens[self._first[clusters] + number]


def expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat each place `counts` times, `[M] -> [P], [P]`: the place, the repetition."""
    place = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return place, torch.arange(len(place), device=counts.device) - first[place]
