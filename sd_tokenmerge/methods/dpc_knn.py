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

from sd_tokenmerge.kernels.backend import needs_fixed_shapes
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.methods.centers import tokens_at
from sd_tokenmerge.methods.distances import center_tokens, nearest, row_blocks, squared_distances
from sd_tokenmerge.methods.numbering import labels_from_roots
from sd_tokenmerge.partitions import Partition

_NEIGHBOURS = 8  # among which one of higher density is looked for first


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
        _, labels = nearest(tokens, tokens_at(tokens, centers))
        roots = centers.gather(1, labels)
        roots.scatter_(1, centers, centers)  # a center among duplicates still keeps its own cluster
        return Partition(labels_from_roots(roots), num_clusters)


def _center_score(tokens: Tensor, k: int) -> Tensor:
    """Logarithm of density times separation, `[N, C] -> [N]`; logarithms do not underflow."""
    count = len(tokens)
    log_density = torch.empty_like(tokens[:, 0])
    distance = tokens.new_empty(count, min(k, _NEIGHBOURS))
    neighbour = torch.empty_like(distance, dtype=torch.int64)
    largest = log_density.new_zeros(())
    for rows in row_blocks(count, count):
        block = squared_distances(tokens[rows], tokens)
        block.diagonal(rows.start).zero_()
        values, index = block.topk(k, largest=False)
        # density of token i: exp(-mean of the squared distances to its k nearest neighbours)
        log_density[rows] = -values.mean(1)
        distance[rows], neighbour[rows] = values[:, :_NEIGHBOURS], index[:, :_NEIGHBOURS]
        largest = torch.maximum(largest, block.amax())
    # distance to the nearest token of higher density; to the farthest of all pairs if none
    denser = log_density[neighbour] > log_density.unsqueeze(1)
    separation = torch.where(denser, distance, torch.inf).amin(1)
    others = torch.arange(count, device=tokens.device)
    if not needs_fixed_shapes(tokens):
        others = others[~denser.any(1)]
    for rows in row_blocks(len(others), count):
        token = others[rows]
        denser = log_density > log_density[token].unsqueeze(1)
        block = squared_distances(tokens[token], tokens)
        separation[token] = torch.where(denser, block, largest).amin(1)
    return log_density + 0.5 * separation.log()
