"""Where K-Means and K-Medoids start: K tokens, chosen without random numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def highest_scores(scores: Tensor, num_clusters: int) -> Tensor:
    """The K tokens of highest score, Token Pooling's start, `[B, N] -> [B, K]` int64."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :num_clusters]


def farthest_first(tokens: Tensor, num_clusters: int) -> Tensor:
    """K tokens that are far from each other, `[B, N, C] -> [B, K]` int64 (Gonzalez, 1985).

    The first is the token nearest to the mean of all; each next one is the token farthest from
    those chosen so far (Euclidean distance; of equally far ones the first).

    These are K dependent steps, but together no more arithmetic than one assignment of N tokens to
    K centers, and they pay: the quality of the result depends on the start more than on the number
    of iterations.

    Args:
        tokens: `[B, N, C]`, centered.
        num_clusters: K.
    """
    return torch.stack([_farthest_first(image, num_clusters) for image in tokens])


def _farthest_first(tokens: Tensor, num_clusters: int) -> Tensor:
    squares = tokens.square().sum(1)
    distance = torch.full_like(squares, torch.inf)
    chosen = []
    newest = squares.argmin(0, keepdim=True)
    for _ in range(num_clusters):
        chosen.append(newest)
        center = tokens.index_select(0, newest)[0]
        to_newest = torch.addmv(squares, tokens, center, alpha=-2) + center.square().sum()
        torch.minimum(distance, to_newest, out=distance)
        distance.index_fill_(0, newest, -torch.inf)  # never chosen again, even where all are equal
        newest = distance.argmax(0, keepdim=True)
    return torch.cat(chosen)
