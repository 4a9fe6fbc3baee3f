"""From the merges of a hierarchy to the labels of its cut."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Merges(NamedTuple):
    """Merges of a hierarchy of N tokens, children before parents.

    Every merge is an edge between two tokens, one from each of the two clusters: the edges of any M
    of the merges form a forest, so that applying them leaves exactly N - M clusters.
    """

    left: Tensor
    """`[M]` int64: a token of the one cluster."""
    right: Tensor
    """`[M]` int64: a token of the other."""
    height: Tensor
    """`[M]` float64: their cosine distance, at least that of the clusters' own merges."""

    def lowest(self, count: int) -> Merges:
        """The `count` lowest merges; of equal heights, children before parents."""
        order = torch.argsort(self.height, stable=True)[:count]
        return Merges(self.left[order], self.right[order], self.height[order])

    def labels(self, num_tokens: int) -> Tensor:
        """The clusters after all these merges, `[N]` int64, numbered by their first tokens."""
        everyone = torch.arange(num_tokens, device=self.left.device)
        label = everyone
        while True:
            left, right = label[self.left], label[self.right]
            lower = torch.minimum(left, right)
            hooked = label.scatter_reduce(0, torch.maximum(left, right), lower, "amin")
            while not torch.equal(jumped := hooked[hooked], hooked):
                hooked = jumped
            if torch.equal(hooked, label):
                break
            label = hooked
        return ((label == everyone).cumsum(0) - 1)[label]


def concatenate(parts: list[Merges]) -> Merges:
    """Join the merges of several rounds, in their order."""
    return Merges(*(torch.cat(column) for column in zip(*parts, strict=True)))
