"""Tokens as centers, and which K-Means and K-Medoids start with, without random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.backend import needs_fixed_shapes
from sd_tokenmerge.methods.nearest_centers import NearestCenters, NearestCentersOfImage

_CANDIDATES = 256  # few enough to stay in the cache


def tokens_at(tokens: Tensor, index: Tensor) -> Tensor:
    """Some tokens of each image, `[B, N, C], [B, M] -> [B, M, C]`; `tokens` are contiguous."""
    batch, count, channels = tokens.shape
    first = torch.arange(batch, device=tokens.device).unsqueeze(1) * count
    # whole rows of a flat table: on the CPU a fraction of the time of a gather per element
    rows = tokens.flatten(0, 1).index_select(0, (index + first).flatten())
    return rows.view(batch, -1, channels)


def highest_scores(scores: Tensor, num_clusters: int) -> Tensor:
    """The K tokens of highest score, Token Pooling's start, `[B, N] -> [B, K]` int64."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :num_clusters]


def farthest_first(nearest: NearestCenters, num_clusters: int) -> Tensor:
    """K tokens that are far from each other, `[B, K]` int64 (Gonzalez, 1985).

    The first is the token nearest to the mean of all; each next one is the token farthest from
    those chosen so far (Euclidean distance; of equally far ones the first).

    These are K dependent steps, but together no more arithmetic than one assignment of N tokens to
    K centers, and they pay: the quality of the result depends on the start more than on the number
    of iterations.

    Args:
        nearest: of centered tokens; afterwards it knows most of what it will be asked first.
        num_clusters: K.
    """
    return torch.stack([_farthest_first(image, num_clusters) for image in nearest.images])


def _farthest_first(image: NearestCentersOfImage, num_clusters: int) -> Tensor:
    tokens = image.tokens
    squares = tokens.square().sum(1)
    chosen = squares.argmin(0, keepdim=True)
    while len(chosen) < num_clusters:
        image.update(tokens[chosen])
        # never chosen again, even where all are equal
        distance = image.distance.index_fill(0, chosen, -torch.inf)
        newest = _next(tokens, squares, distance, num_clusters - len(chosen))
        chosen = torch.cat((chosen, newest))
    return chosen


def _next(tokens: Tensor, squares: Tensor, distance: Tensor, most: int) -> Tensor:
    """The next tokens, at least one, `[N, C], [N], [N] -> [M]` int64; may overwrite `distance`.

    Distances only shrink. So as long as one of the farthest tokens stays farther than all the
    others were, it is the next, and only these few are compared with each new one.
    """
    if len(tokens) <= _CANDIDATES or needs_fixed_shapes(tokens):
        return torch.cat(_steps(tokens, squares, distance, most, None))
    farthest, candidates = distance.topk(_CANDIDATES + 1)
    candidates = candidates[:-1].sort().values  # of equally far ones the first
    own_tokens, own_squares, own_distance = (
        values.index_select(0, candidates) for values in (tokens, squares, distance)
    )
    steps = _steps(own_tokens, own_squares, own_distance, most, float(farthest[-1]))
    return candidates[torch.cat(steps)] if steps else distance.argmax(0, keepdim=True)


def _steps(
    tokens: Tensor, squares: Tensor, distance: Tensor, most: int, floor: float | None
) -> list[Tensor]:
    """The next tokens, `most` at most, while their distance is above `floor`."""
    chosen: list[Tensor] = []
    while len(chosen) < most:
        newest = distance.argmax(0, keepdim=True)
        if floor is not None and float(distance[newest]) <= floor:
            break
        chosen.append(newest)
        center = tokens.index_select(0, newest)[0]
        to_newest = torch.addmv(squares, tokens, center, alpha=-2) + squares[newest]
        torch.minimum(distance, to_newest, out=distance)
        distance.index_fill_(0, newest, -torch.inf)
    return chosen
