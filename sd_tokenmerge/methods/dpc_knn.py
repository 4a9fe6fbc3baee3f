"""Density peaks clustering on k nearest neighbours, DPC-KNN (Du et al., 2016).

As in the token clustering of TCFormer (Zeng et al., CVPR 2022): cluster centers are tokens of high
density that are far from any denser token, and every other token joins its nearest center.
Distances are Euclidean, divided by sqrt(C). Deterministic: the first token wins a tie, where the
public implementation adds random noise to the densities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.methods.distances import center_tokens, nearest, row_blocks, squared_distances
from sd_tokenmerge.methods.numbering import labels_from_roots
from sd_tokenmerge.methods.token_pooling import tokens_at
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class DPCKNN(Method):
    """Density peaks by k nearest neighbours.

    Attributes:
        k: number of nearest tokens, including the token itself, that determine its density; from 1
            to N.
    """

    name: ClassVar[str] = "dpc-knn"
    k: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("k", 1)

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
        roots.scatter_(1, centers, centers)  # a center equal to another keeps its own cluster
        return Partition(labels_from_roots(roots), num_clusters)


def _center_score(tokens: Tensor, k: int) -> Tensor:
    """Logarithm of density times separation, `[N, C] -> [N]`; the logarithm avoids underflow.

    The density of a token is exp(-mean squared distance to its k nearest tokens). Its separation is
    the distance to the nearest denser token or, for the densest, the largest distance of any pair.
    """
    count = len(tokens)
    log_density = torch.empty_like(tokens[:, 0])
    separation = torch.empty_like(log_density)
    largest = log_density.new_zeros(())
    for rows in row_blocks(count, count):
        block = squared_distances(tokens[rows], tokens)
        block.diagonal(rows.start).zero_()
        log_density[rows] = -block.topk(k, largest=False).values.mean(1)
        largest = torch.maximum(largest, block.amax())
    for rows in row_blocks(count, count):
        denser = log_density > log_density[rows].unsqueeze(1)
        block = squared_distances(tokens[rows], tokens)
        separation[rows] = torch.where(denser, block, largest).amin(1)
    return log_density + 0.5 * separation.log()
