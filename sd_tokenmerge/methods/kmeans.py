"""K-Means as in Token Pooling (Marin et al., WACV 2023).

Lloyd's iterations for the reconstruction error, the sum over the tokens of the squared Euclidean
distance to the nearest cluster center; with `weighted`, each token's distance counts by its
significance score, and the centers are weighted means. A center that attracts no token is given the
token farthest from its own center (as scikit-learn does), so all K clusters stay in use.
Deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sd_tokenmerge.kernels.segments import segment_sum
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.methods.centers import farthest_first, highest_scores, tokens_at
from sd_tokenmerge.methods.distances import center_tokens
from sd_tokenmerge.methods.nearest_centers import NearestCenters
from sd_tokenmerge.methods.numbering import cheapest_members, number_by_first_token
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class KMeans(Method):
    """Lloyd's K-Means on Euclidean distance.

    Attributes:
        weighted: weigh the tokens by `scores` and start at the K highest ones; otherwise all tokens
            weigh the same, and the start is `centers.farthest_first`.
        iterations: how often centers are recomputed, at least 1; then tokens are assigned once
            more.
    """

    name: ClassVar[str] = "kmeans"
    order_free: ClassVar[bool] = True
    weighted: bool = False
    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations < 1:
            raise ValueError(
                f"`iterations` of {self.name} must be at least 1, got {self.iterations}."
            )

    @property
    def uses_scores(self) -> bool:
        """True for the weighted variant."""
        return self.weighted

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        tokens = center_tokens(tokens)
        nearest = NearestCenters(tokens)
        if scores is None:
            start = farthest_first(nearest, num_clusters)
        else:
            start = highest_scores(scores, num_clusters)
        centers = tokens_at(tokens, start)
        for _ in range(self.iterations):
            labels = _assign(nearest, centers)
            centers = weighted_means(tokens, labels, num_clusters, scores)
        labels = _assign(nearest, centers)
        return Partition(number_by_first_token(labels, num_clusters), num_clusters)


def weighted_means(
    tokens: Tensor, labels: Tensor, num_clusters: int, weights: Tensor | None
) -> Tensor:
    """Mean of each cluster, `[B, N, C] -> [B, K, C]`, weighted where `weights` `[B, N]` are given.

    The plain mean stands in where all weights of a cluster are zero. No cluster may be empty.
    """
    ones = torch.ones_like(tokens[..., :1])
    if weights is None:
        weights = ones
    else:
        weights = weights.unsqueeze(-1)
        totals = segment_sum(weights, labels, num_clusters).gather(1, labels.unsqueeze(-1))
        weights = torch.where(totals > 0, weights, ones)
    sums = segment_sum(tokens * weights, labels, num_clusters)
    return sums / segment_sum(weights, labels, num_clusters)


def _assign(nearest: NearestCenters, centers: Tensor) -> Tensor:
    """Label each token with its nearest center, then give empty clusters one token each."""
    num_clusters = centers.shape[1]
    distance, labels = nearest.of(centers)
    sizes = Partition(labels, num_clusters).sizes
    # The nearest token of each cluster stays; of the others, the farthest move first.
    stays = cheapest_members(labels, distance, num_clusters).gather(1, labels)
    is_staying = stays == torch.arange(labels.shape[1], device=labels.device)
    movable = distance.masked_fill(is_staying, -torch.inf)
    farthest = movable.argsort(dim=1, descending=True, stable=True)[:, :num_clusters]
    empty_first = sizes.argsort(dim=1, stable=True)
    is_empty = sizes.gather(1, empty_first) == 0
    return labels.scatter(
        1, farthest, torch.where(is_empty, empty_first, labels.gather(1, farthest))
    )
