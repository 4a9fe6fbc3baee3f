"""Nearest neighbours by cosine and Euclidean distance, in blocks of bounded memory.

Products are computed image by image, so that rounding never depends on the rest of the batch and
memory does not grow with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_SIZE = 2**20
"""Number of elements in the largest block of distances: 4 MiB in float32."""


def row_blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of rows, such that `rows * num_columns` stays within `BLOCK_SIZE`."""
    step = max(1, BLOCK_SIZE // num_columns)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def unit_tokens(tokens: Tensor) -> Tensor:
    """Scale tokens to unit length, `[..., C] -> [..., C]`; zero stays zero (cosine 0 to all)."""
    return torch.nn.functional.normalize(tokens, dim=-1)


def center_tokens(tokens: Tensor) -> Tensor:
    """Subtract each image's mean token, `[B, N, C] -> [B, N, C]`.

    Euclidean distances stay the same, and `squared_distances` loses fewer digits to cancellation.
    """
    return tokens - tokens.mean(dim=1, keepdim=True)


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Squared Euclidean distances |x|^2 - 2xy + |y|^2, at least 0, `[R, C], [S, C] -> [R, S]`."""
    products = torch.addmm(columns.square().sum(1), rows, columns.T, alpha=-2)
    return products.add_(rows.square().sum(1, keepdim=True)).clamp_(min=0)


def most_similar(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Find the key most similar to each query, `[B, S, C], [B, D, C] -> [B, S]` twice.

    Args:
        queries: unit vectors.
        keys: unit vectors; the first wins a tie.

    Returns:
        The cosine similarities and the int64 indices of the keys.
    """
    similarity = queries.new_empty(queries.shape[:2])
    index = torch.empty_like(similarity, dtype=torch.int64)
    for image in range(len(queries)):
        for rows in row_blocks(queries.shape[1], keys.shape[1]):
            products = queries[image, rows] @ keys[image].T
            torch.max(products, dim=1, out=(similarity[image, rows], index[image, rows]))
    return similarity, index


def nearest(tokens: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Find the center nearest to each token, `[B, N, C], [B, K, C] -> [B, N]` twice.

    Returns:
        The squared Euclidean distances and the int64 indices of the centers; the first center wins
        a tie.
    """
    distance = tokens.new_empty(tokens.shape[:2])
    index = torch.empty_like(distance, dtype=torch.int64)
    for image in range(len(tokens)):
        for rows in row_blocks(tokens.shape[1], centers.shape[1]):
            block = squared_distances(tokens[image, rows], centers[image])
            torch.min(block, dim=1, out=(distance[image, rows], index[image, rows]))
    return distance, index
