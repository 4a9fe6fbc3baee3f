"""The common part of Token Pooling's K-Means and K-Medoids (Marin et al., WACV 2023)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sd_tokenmerge.kernels.segments import segment_sum
from sd_tokenmerge.methods.base import Method


@dataclass(frozen=True)
class TokenPooling(Method):
    """Iterative clustering around K centers by Euclidean distance.

    Attributes:
        weighted: weight tokens by `scores` and start from the K highest ones; by default, all
            tokens weigh the same and the start is `farthest_first`.
        iterations: number of times the centers are recomputed, at least 1.
    """

    weighted: bool = False
    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("iterations", 1)

    @property
    def uses_scores(self) -> bool:
        """True for the weighted variant."""
        return self.weighted


def starting_tokens(tokens: Tensor, num_clusters: int, scores: Tensor | None) -> Tensor:
    """Choose the tokens to start from: the K highest `scores`, or `farthest_first` without scores.

    Args:
        tokens: `[B, N, C]`, centered.
        num_clusters: K.
        scores: `[B, N]`, or None.

    Returns:
        `[B, K]` int64 token indices.
    """
    if scores is not None:
        return scores.argsort(dim=1, descending=True, stable=True)[:, :num_clusters]
    return torch.stack([farthest_first(image, num_clusters) for image in tokens])


def farthest_first(tokens: Tensor, num_clusters: int) -> Tensor:
    """Choose K tokens that are far from each other, `[N, C] -> [K]` int64 (Gonzalez, 1985).

    The first is the token nearest to the origin, which is the mean of centered tokens. Each
    following one is the token farthest from those chosen so far, in Euclidean distance; the first
    token wins a tie. K sequential steps, but the result of the clustering depends on its start more
    than on the number of iterations.
    """
    squares = tokens.square().sum(1)
    distance = torch.full_like(squares, torch.inf)
    newest = squares.argmin(0, keepdim=True)
    chosen = [newest]
    while len(chosen) < num_clusters:
        center = tokens.index_select(0, newest)[0]
        to_newest = torch.addmv(squares, tokens, center, alpha=-2) + squares[newest]
        torch.minimum(distance, to_newest, out=distance)
        distance.index_fill_(0, newest, -torch.inf)  # never again, even if all tokens are equal
        newest = distance.argmax(0, keepdim=True)
        chosen.append(newest)
    return torch.cat(chosen)


def tokens_at(tokens: Tensor, index: Tensor) -> Tensor:
    """Select tokens of each image, `[B, N, C], [B, M] -> [B, M, C]`."""
    # unlike `gather`, this does not expand the index to [B, M, C]
    image = torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
    return tokens[image, index]


def weighted_means(
    tokens: Tensor, labels: Tensor, num_clusters: int, weights: Tensor | None
) -> Tensor:
    """Mean of each cluster, `[B, N, C] -> [B, K, C]`, weighted if `weights` `[B, N]` are given.

    A cluster whose weights are all zero gets its plain mean. No cluster may be empty.
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
