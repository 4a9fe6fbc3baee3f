"""K-Medoids as in Token Pooling (Marin et al., WACV 2023).

Like K-Means, but each center is the medoid of its cluster: the member with the smallest sum of
squared Euclidean distances to all members, weighted by their significance scores if `weighted`.
Merging returns the medoid instead of the mean. A medoid always belongs to its own cluster, so all K
clusters stay in use. Deterministic.

For squared Euclidean distances, sum_j w_j |x_i - x_j|^2 = W |x_i - m|^2 + const, where W is the sum
of the weights and m the weighted mean, so the medoid is the member nearest to the weighted mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.methods.distances import (
    center_tokens,
    nearest,
    row_blocks,
    squared_distances,
)
from sd_tokenmerge.methods.numbering import cheapest_members, labels_from_roots
from sd_tokenmerge.methods.token_pooling import (
    TokenPooling,
    starting_tokens,
    tokens_at,
    weighted_means,
)
from sd_tokenmerge.partitions import Partition

MEDOID_TOLERANCE = 1e-5
"""A token replaces the medoid only if its cost is lower by more than this fraction: rounding must
not decide between equally good members, such as the two of a pair."""


@dataclass(frozen=True)
class KMedoids(TokenPooling):
    """K-Medoids with Euclidean distance; each cluster is represented by its medoid.

    Attributes:
        weighted: weight tokens by their scores and start from the K highest ones; by default, all
            tokens weigh the same and the start is a farthest-first traversal.
        iterations: number of times the medoids are recomputed, at least 1; a final assignment
            follows.
        medoid: how the medoid is chosen. `"paper"`: smallest weighted sum of squared distances to
            the cluster. `"public"`: as in the public implementation that the ATC paper compares
            with, smallest product of the token's score and its summed distance to all N tokens.
    """

    name: ClassVar[str] = "kmedoids"
    medoid: Literal["paper", "public"] = "paper"

    @property
    def has_representatives(self) -> bool:
        """True: the medoids."""
        return True

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        tokens = center_tokens(tokens)
        medoids = starting_tokens(tokens, num_clusters, scores)
        public_cost = _public_cost(tokens, scores) if self.medoid == "public" else None
        for _ in range(self.iterations):
            labels = _assign(tokens, medoids)
            cost = public_cost
            if cost is None:
                means = weighted_means(tokens, labels, num_clusters, scores)
                cost = (tokens - tokens_at(means, labels)).square().sum(-1)
                cost.scatter_(1, medoids, cost.gather(1, medoids) * (1 - MEDOID_TOLERANCE))
            medoids = cheapest_members(labels, cost, num_clusters)
        roots = medoids.gather(1, _assign(tokens, medoids))
        return Partition(labels_from_roots(roots), num_clusters, medoids.sort(dim=1).values)


def _assign(tokens: Tensor, medoids: Tensor) -> Tensor:
    """Label each token with its nearest medoid, and each medoid with itself."""
    _, labels = nearest(tokens, tokens_at(tokens, medoids))
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
