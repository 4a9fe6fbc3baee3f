"""The few most similar vectors of each, in fixed shape, with exact similarities."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sd_tokenmerge.kernels.device.rounds import row_blocks
from sd_tokenmerge.kernels.exact import pair_similarities
from sd_tokenmerge.kernels.ranking import largest
from sd_tokenmerge.kernels.search import float32_error, precise_dtype

_LISTED = 2


class Few(NamedTuple):
    """Candidates for the nearest of each of W vectors, L for each."""

    similarity: Tensor
    """`[B, W, L]` float64, exact; -inf where there are fewer candidates."""
    place: Tensor
    """`[B, W, L]` int64; arbitrary where the similarity is -inf."""
    rest: Tensor
    """`[B, W]` float64; no vector that is not listed is more similar than this."""


def most_similar(vectors: Tensor, group: Tensor, valid: Tensor) -> Few:
    """List the most similar valid vectors of another group, in each image.

    The product is a filter in `precise_dtype`, taken in blocks of rows.

    Args:
        vectors: `[B, W, C]` float64, of length at most one.
        group: `[B, W]` int64.
        valid: `[B, W]` bool.
    """
    batch, width, channels = vectors.shape
    quick = vectors.to(precise_dtype(vectors.device))
    group, hidden = group.expand(batch, width), ~valid.unsqueeze(1)
    first = torch.arange(batch, device=vectors.device).view(batch, 1, 1) * width
    found = []
    for rows in row_blocks(width, batch * (width + 6 * _LISTED * channels)):
        value = quick[:, rows] @ quick.mT
        value.masked_fill_(group[:, rows].unsqueeze(2) == group.unsqueeze(1), -torch.inf)
        value.masked_fill_(hidden, -torch.inf)
        listed, place, rest = (part.view(batch, -1, *part.shape[1:]) for part in _largest(value))
        others = vectors.flatten(0, 1).index_select(0, (first + place).flatten())
        own = vectors[:, rows].unsqueeze(2).expand(-1, -1, _LISTED, -1)
        exact = pair_similarities(own.reshape(-1, channels), others).view(place.shape)
        exact = exact.masked_fill(listed == -torch.inf, -torch.inf)
        found.append((exact, place, rest.double() + float32_error(channels)))
    return Few(*(torch.cat(parts, 1) for parts in zip(*found, strict=True)))


def _largest(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return largest(value.flatten(0, 1), _LISTED)
