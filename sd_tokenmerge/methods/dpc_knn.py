"""Density peaks clustering on k nearest neighbours, DPC-KNN (Du et al., 2016).

As the token clustering of TCFormer (Zeng et al., CVPR 2022) uses it: tokens that have a high
density and are far from any token of higher density are cluster centers; every other token joins
its nearest center. Distances are Euclidean, divided by sqrt(C). Deterministic: the random noise
that the public implementation adds to tell equal densities apart is left out; of equal scores the
first token wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.methods.distances import center_tokens, nearest, row_blocks, squared_distances
from sd_tokenmerge.methods.numbering import labels_from_roots
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class DPCKNN(Method):
    """Density peaks by k nearest neighbours.

    Attributes:
        k: neighbours that count for a token's density, the token itself among them; in [1, N].
    """

    name: ClassVar[str] = "dpc-knn"
    order_free: ClassVar[bool] = True
    k: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise ValueError(f"`k` of {self.name} must be at least 1, got {self.k}.")

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        if self.k > grid.num_tokens:
            raise ValueError(f"`k` of {self} must be at most N = {grid.num_tokens}.")
        tokens = center_tokens(tokens) / tokens.shape[-1] ** 0.5
        score = torch.stack([_center_score(image, self.k) for image in tokens])
        centers = score.argsort(dim=1, descending=True, stable=True)[:, :num_clusters]
        index = centers.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        _, labels = nearest(tokens, tokens.gather(1, index))
        roots = centers.gather(1, labels)
        roots.scatter_(1, centers, centers)  # a center among duplicates still keeps its own cluster
        return Partition(labels_from_roots(roots), num_clusters)


def _center_score(tokens: Tensor, k: int) -> Tensor:
    """Logarithm of density times separation, `[N, C] -> [N]`; logarithms do not underflow."""
    count = len(tokens)
    log_density = torch.empty_like(tokens[:, 0])
    largest = torch.zeros_like(log_density)
    for rows in row_blocks(count, count):
        distance = _squared(tokens, rows)
        # density of token i: exp(-mean of the squared distances to its k nearest neighbours)
        log_density[rows] = -distance.topk(k, largest=False).values.mean(1)
        largest[rows] = distance.amax(1)
    separation = torch.empty_like(log_density)
    for rows in row_blocks(count, count):
        denser = log_density > log_density[rows].unsqueeze(1)
        # distance to the nearest token of higher density; to the farthest of all pairs if none
        separation[rows] = torch.where(denser, _squared(tokens, rows), largest.amax()).amin(1)
    return log_density + 0.5 * separation.log()


def _squared(tokens: Tensor, rows: slice) -> Tensor:
    distance = squared_distances(tokens[rows], tokens)
    distance.diagonal(rows.start).zero_()
    return distance
