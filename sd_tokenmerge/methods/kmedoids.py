"""K-Medoids as in Token Pooling (Marin et al., WACV 2023).

As K-Means, but each center is one of the cluster's own tokens, its medoid: the token with the
smallest sum of squared Euclidean distances to the cluster's tokens, each counted by its
significance score where `weighted`. The merged token is the medoid, not the mean. A medoid always
belongs to its own cluster, so all K clusters stay in use. Deterministic.

For squared Euclidean distances, sum_j w_j |x_i - x_j|^2 = W |x_i - m|^2 + const, with W the sum of
the weights and m the weighted mean, so the medoid is the token nearest to the weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.methods.centers import farthest_first, highest_scores, tokens_at
from sd_tokenmerge.methods.distances import center_tokens, row_blocks, squared_distances
from sd_tokenmerge.methods.kmeans import weighted_means
from sd_tokenmerge.methods.nearest_centers import NearestCenters
from sd_tokenmerge.methods.numbering import cheapest_members, labels_from_roots
from sd_tokenmerge.partitions import Partition

ROUNDING = 1e-5
"""A token must be better by this share to become the medoid; those of a pair are equally good."""


@dataclass(frozen=True)
class KMedoids(Method):
    """K-Medoids on Euclidean distance; clusters are represented by their medoids.

    Attributes:
        weighted: weigh the tokens by `scores` and start at the K highest ones; otherwise all tokens
            weigh the same, and the start is `centers.farthest_first`.
        iterations: how often medoids are recomputed, at least 1; then tokens are assigned once
            more.
        medoid: `"paper"` as above. `"public"` as in the public implementation that the ATC paper
            compares with: the token of the cluster with the smallest product of its own score and
            the sum of its distances to all N tokens.
    """

    name: ClassVar[str] = "kmedoids"
    order_free: ClassVar[bool] = True
    weighted: bool = False
    iterations: int = 5
    medoid: Literal["paper", "public"] = "paper"

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

    @property
    def has_representatives(self) -> bool:
        """Always: the medoids."""
        return True

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        tokens = center_tokens(tokens)
        nearest = NearestCenters(tokens)
        if scores is None:
            medoids = farthest_first(nearest, num_clusters)
        else:
            medoids = highest_scores(scores, num_clusters)
        public_cost = _public_cost(tokens, scores) if self.medoid == "public" else None
        for _ in range(self.iterations):
            labels = _assign(nearest, tokens, medoids)
            if public_cost is not None:
                medoids = cheapest_members(labels, public_cost, num_clusters)
                continue
            means = weighted_means(tokens, labels, num_clusters, scores)
            cost = (tokens - tokens_at(means, labels)).square().sum(-1)
            cost.scatter_(1, medoids, cost.gather(1, medoids) * (1 - ROUNDING))
            medoids = cheapest_members(labels, cost, num_clusters)
        roots = medoids.gather(1, _assign(nearest, tokens, medoids))
        return Partition(labels_from_roots(roots), num_clusters, medoids.sort(dim=1).values)


def _assign(nearest: NearestCenters, tokens: Tensor, medoids: Tensor) -> Tensor:
    """Label each token with its nearest medoid, and each medoid with itself."""
    _, labels = nearest.of(tokens_at(tokens, medoids))
    own = torch.arange(medoids.shape[1], device=tokens.device).expand_as(medoids)
    return labels.scatter(1, medoids, own)


def _public_cost(tokens: Tensor, scores: Tensor | None) -> Tensor:
    count = tokens.shape[1]
    total = torch.empty_like(tokens[..., 0])
    for image in range(len(tokens)):
        for rows in row_blocks(count, count):
            distances = squared_distances(tokens[image, rows], tokens[image]).sqrt_()
            total[image, rows] = distances.sum(1)
    return total if scores is None else total * scores
