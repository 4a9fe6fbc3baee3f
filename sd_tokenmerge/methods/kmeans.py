"""K-Means as in Token Pooling (Marin et al., WACV 2023).

Lloyd's algorithm minimises the reconstruction error: the sum over all tokens of the squared
Euclidean distance to the nearest center. With `weighted`, distances are multiplied by the tokens'
significance scores and centers are weighted means. A center without tokens takes the token farthest
from its own center, as in scikit-learn, so that all K clusters stay in use. Deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sd_tokenmerge.kernels.segments import Segments
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.methods.distances import center_tokens, nearest
from sd_tokenmerge.methods.numbering import cheapest_members, number_by_first_token
from sd_tokenmerge.methods.token_pooling import (
    TokenPooling,
    starting_tokens,
    tokens_at,
    weighted_means,
)
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class KMeans(TokenPooling):
    """Lloyd's K-Means with Euclidean distance.

    Attributes:
        weighted: weight tokens by their scores and start from the K highest ones; by default, all
            tokens weigh the same and the start is a farthest-first traversal.
        iterations: number of times the centers are recomputed, at least 1; a final assignment
            follows.
    """

    name: ClassVar[str] = "kmeans"

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        tokens = center_tokens(tokens)
        labels = _assign(tokens, tokens_at(tokens, starting_tokens(tokens, num_clusters, scores)))
        return lloyd(tokens, labels, num_clusters, self.iterations, scores)


def lloyd(
    tokens: Tensor,
    labels: Tensor,
    num_clusters: int,
    iterations: int,
    weights: Tensor | None = None,
) -> Partition:
    """Lloyd's iterations: take the mean of each cluster, and assign each token to the nearest.

    Args:
        tokens: `[B, N, C]`, centered.
        labels: `[B, N]` int64 of K non-empty clusters to start from.
        num_clusters: K.
        iterations: how often.
        weights: `[B, N]` of the tokens in the means; None: all weigh the same.
    """
    for _ in range(iterations):
        labels = _assign(tokens, weighted_means(tokens, labels, num_clusters, weights))
    return Partition(number_by_first_token(labels, num_clusters), num_clusters)


def _assign(tokens: Tensor, centers: Tensor) -> Tensor:
    """Label each token with its nearest center, then give each empty cluster one token."""
    num_clusters = centers.shape[1]
    distance, labels = nearest(tokens, centers)
    sizes = Segments(labels, num_clusters).sizes
    # The nearest token of each cluster stays; the farthest of the others move first.
    stays = cheapest_members(labels, distance, num_clusters).gather(1, labels)
    is_staying = stays == torch.arange(labels.shape[1], device=labels.device)
    movable = distance.masked_fill(is_staying, -torch.inf)
    farthest = movable.argsort(dim=1, descending=True, stable=True)[:, :num_clusters]
    empty_first = sizes.argsort(dim=1, stable=True)
    is_empty = sizes.gather(1, empty_first) == 0
    return labels.scatter(
        1, farthest, torch.where(is_empty, empty_first, labels.gather(1, farthest))
    )
