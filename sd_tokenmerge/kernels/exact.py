"""Similarities in float64 that no order of summation can change.

A floating-point dot product depends on the order of its additions, which the BLAS chooses: it may
change with the shape of the product, the number of threads or the device. Here
each vector is split into two fixed-point parts, `x = high + low`, whose products are integers
(times a power of two) so small that every partial sum fits into float64's 53 bits. Every sum of
such products is exact, so every order gives the same bits (the error-free splitting of Ozaki et
al., "Error-free transformations of matrix multiplication", 2012). Everything else is one correctly
rounded IEEE operation per element.

So `pair_similarities`, `similarity_block` and `nearest_exact` agree to the last bit on any device,
in any block shape. Clustering compares these values, and only these, wherever a comparison is
close.
"""

from __future__ import annotations

from math import ceil, log2

import torch
from torch import Tensor

_HIGH_BITS = 26  # two of them make 52: sums of high * high stay below 2^53
_BLOCK_ELEMENTS = 1 << 19  # float64 similarities in one block: 4 MiB
_SQUARES = 1 << 16  # added together: 512 KiB


def unit_vectors(tokens: Tensor) -> Tensor:
    """Scale each token to length one, `[N, C] -> [N, C]` float64, contiguous; zero stays zero.

    The squares are added in a fixed tree, so that the result is the same on every device.

    Args:
        tokens: `[N, C]`, any float dtype.

    Raises:
        ValueError: `tokens` are not finite.
    """
    # a UNet's blocks store tokens channel by channel, which makes gathering rows slower
    exact = tokens.to(torch.float64, memory_format=torch.contiguous_format)
    if tokens.dtype == torch.float64:  # squares of narrower floats cannot overflow in float64
        largest = exact.abs().amax(1, keepdim=True)
        exact = exact / torch.where(largest > 0, largest, 1.0)
    return exact.div_(lengths(exact))


def lengths(tokens: Tensor) -> Tensor:
    """The length of each token, one for a zero token, `[N, C] -> [N, 1]` float64.

    Args:
        tokens: `[N, C]` float64, such that their squares do not overflow.

    Raises:
        ValueError: `tokens` are not finite.
    """
    # allocating and freeing a large array of squares takes longer than adding them; on
    # accelerators, the number of calls matters more
    rows = max(1, _SQUARES // tokens.shape[1]) if tokens.is_cpu else len(tokens)
    squares = [_tree_sum(part * part) for part in torch.split(tokens, rows)]
    length = torch.cat(squares).sqrt()
    if not bool(length.isfinite().all()):
        raise ValueError("`tokens` must be finite, got NaN or infinity.")
    return torch.where(length > 0, length, 1.0)


def pair_similarities(left: Tensor, right: Tensor) -> Tensor:
    """Dot product of each pair of rows of length at most one, `[P, C], [P, C] -> [P]` float64."""
    left_high, left_low = _split(left)
    right_high, right_low = _split(right)
    cross = left_low.mul_(right_high).sum(1) + right_low.mul_(left_high).sum(1)
    return left_high.mul_(right_high).sum(1) + cross


def similarity_block(rows: Tensor, columns: Tensor) -> Tensor:
    """`pair_similarities` of all rows with all columns, `[M, C], [N, C] -> [M, N]` float64."""
    row_high, row_low = _split(rows)
    column_high, column_low = _split(columns)
    cross = (row_high @ column_low.T).addmm_(row_low, column_high.T)
    return cross.add_(row_high @ column_high.T)  # not addmm: it may start its sums from `cross`


def nearest_exact(rows: Tensor, row_ids: Tensor, columns: Tensor, column_ids: Tensor) -> Tensor:
    """The id of each row's most similar column of another id, `-> [M]` int64.

    Ties go to the smallest `row_id XOR column_id` (see `sd_tokenmerge.kernels.rounds`).

    Args:
        rows: `[M, C]` float64.
        row_ids: `[M]` int64.
        columns: `[N, C]` float64; at least one id differs from each row's.
        column_ids: `[N]` int64, distinct.
    """
    step = rows_per_block(len(columns))
    found = [
        best_by_id(similarity_block(part, columns), ids, column_ids)
        for part, ids in zip(torch.split(rows, step), torch.split(row_ids, step), strict=True)
    ]
    return torch.cat(found)


def rows_per_block(columns: int) -> int:
    """Number of rows in a block of exact similarities."""
    return max(1, _BLOCK_ELEMENTS // columns)


def best_by_id(similarity: Tensor, row_ids: Tensor, column_ids: Tensor) -> Tensor:
    """Column id of each row's largest similarity, ties to the smallest XOR, `[M, N] -> [M]` int64.

    Args:
        similarity: `[M, N]` float64, exact.
        row_ids: `[M]` int64; the column of the same id is left out.
        column_ids: `[N]` int64, distinct.
    """
    distance = row_ids.unsqueeze(1) ^ column_ids
    similarity = similarity.masked_fill(distance == 0, -torch.inf)
    best = similarity.amax(1, keepdim=True)
    tied = torch.where(similarity == best, distance, torch.iinfo(torch.int64).max)
    return row_ids ^ tied.amin(1)


def best_of_pairs(
    similarity: Tensor, pair_row: Tensor, row_ids: Tensor, pair_ids: Tensor
) -> Tensor:
    """As `best_by_id`, for a list of pairs, `[P] -> [M]` int64.

    Args:
        similarity: `[P]` float64, exact.
        pair_row: `[P]` int64 in [0, M); every row has at least one pair.
        row_ids: `[M]` int64.
        pair_ids: `[P]` int64, the column's id of each pair, not that of its row.
    """
    best = similarity.new_full((len(row_ids),), -torch.inf)
    best = best.scatter_reduce(0, pair_row, similarity, "amax")
    farthest = torch.iinfo(torch.int64).max
    distance = torch.where(similarity == best[pair_row], row_ids[pair_row] ^ pair_ids, farthest)
    nearest = torch.full_like(row_ids, farthest).scatter_reduce(0, pair_row, distance, "amin")
    return row_ids ^ nearest


def _split(vectors: Tensor) -> tuple[Tensor, Tensor]:
    high = _rounded(vectors.clone(), _HIGH_BITS)
    return high, _rounded(vectors - high, low_bits(vectors.shape[1]))


def _rounded(values: Tensor, bits: int) -> Tensor:
    """Round in place to `bits` bits after the point, by adding and subtracting a large number."""
    large = 1.5 * 2.0 ** (52 - bits)
    return values.add_(large).sub_(large)


def low_bits(channels: int) -> int:
    """Number of bits after the point of the low parts.

    `high` is a multiple of 2^-26, `low` one of 2^-low_bits with |low| <= 2^-27. By Cauchy-Schwarz
    the terms of the cross product sum to about 2 sqrt(C) 2^-27 at most; in units of
    2^-(26 + low_bits) that is sqrt(C) 2^low_bits, half of the 2^53 up to which float64 counts
    exactly.
    """
    return 52 - ceil(log2(channels) / 2)


def _tree_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension, kept, by halving: `[N, C] -> [N, 1]`."""
    while (width := values.shape[1]) > 1:
        half = width // 2
        folded = values[:, :half] + values[:, half : 2 * half]
        values = torch.cat((folded, values[:, 2 * half :]), 1) if width % 2 else folded
    return values
