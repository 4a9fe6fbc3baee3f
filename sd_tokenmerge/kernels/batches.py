"""Nearest neighbours within each image of a batch: all images at once, or one after the other.

What a search needs besides its product, dozens of calls on short arrays, takes as long for few rows
as for many. So small images are searched in one product, in full precision
(`sd_tokenmerge.kernels.images`); the products of others are so long that a fast dtype is worth its
calls (`sd_tokenmerge.kernels.nearest`). Token n of image b has the number `b * N + n`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.images import are_small, lists_by_image
from sd_tokenmerge.kernels.nearest import mutual_nearest_lists, nearest_lists
from sd_tokenmerge.kernels.ranking import LANES, clear, close_to_largest
from sd_tokenmerge.kernels.search import Lists, float32_error, join_lists

MOST_CANDIDATES = 16  # of more, as among duplicates, a product of all is cheaper
_BLOCK_ELEMENTS = 1 << 18  # similarities looked at together: 1 MiB


def first_lists(vectors: Tensor, dtype: torch.dtype) -> Lists:
    """The most similar other tokens of every token in its image, `[B, N, C] -> [B * N, L]`.

    Args:
        vectors: of length at most one, in `precise_dtype`.
        dtype: see `nearest_lists`.
    """
    batch, count, _ = vectors.shape
    if are_small(count):
        everyone = torch.arange(batch * count, device=vectors.device)
        return lists_by_image(vectors, everyone, everyone)
    found = [mutual_nearest_lists(image, dtype) for image in vectors]
    return join_lists(
        [lists._replace(column=lists.column + number * count) for number, lists in enumerate(found)]
    )


def batch_lists(vectors: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Lists:
    """The most similar columns of each row in its image, `[M], [S] -> [M, L]`.

    Args:
        vectors: `[B, N, C]` of length at most one, in `precise_dtype`.
        rows: `[M]` int64, ascending token numbers; M is at least 1.
        columns: `[S]` int64, ascending token numbers; all rows are among them, and are left out of
            their own lists.
        dtype: see `nearest_lists`.
    """
    batch, count, _ = vectors.shape
    if are_small(count):
        return lists_by_image(vectors, rows, columns)
    firsts = torch.arange(0, (batch + 1) * count, count, device=rows.device)
    row_ends = torch.searchsorted(rows, firsts).tolist()
    column_ends = torch.searchsorted(columns, firsts).tolist()
    flat = vectors.flatten(0, 1)
    found = []
    for image in range(batch):
        row = rows[row_ends[image] : row_ends[image + 1]]
        if len(row) == 0:
            continue
        column = columns[column_ends[image] : column_ends[image + 1]]
        lists = nearest_lists(flat, row, column, torch.searchsorted(column, row), dtype)
        found.append(lists._replace(column=column[lists.column]))
    return join_lists(found)


def all_candidates(vectors: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All columns that may be the most similar one of a row in its image, `[M], [S]`.

    No lists, hence few calls, and nothing that is of use for the next search.

    Args:
        vectors: `[B, N, C]` of length at most one, in `precise_dtype`.
        rows: as for `batch_lists`.
        columns: as for `batch_lists`.

    Returns:
        An upper bound of the largest similarity, `[M]` float64, -inf where there is no other
        column; then pairs, `[P]` int64: places in `rows`, ascending, and columns. A row with more
        than `MOST_CANDIDATES` has no pairs.
    """
    batch, count, channels = vectors.shape
    error = float32_error(channels)
    firsts = torch.arange(0, (batch + 1) * count, count, device=rows.device)
    row_ends = torch.searchsorted(rows, firsts).tolist()
    column_ends = torch.searchsorted(columns, firsts).tolist()
    own = torch.searchsorted(columns, rows)
    flat = vectors.flatten(0, 1)
    left, right = flat.index_select(0, rows), flat.index_select(0, columns)
    bounds, places, found = [], [], []
    for image in range(batch):
        first, last = column_ends[image : image + 2]
        step = max(1, _BLOCK_ELEMENTS // max(1, last - first))
        for start in range(row_ends[image], row_ends[image + 1], step):
            stop = min(start + step, row_ends[image + 1])
            values = left.new_empty(stop - start, -(-(last - first) // LANES) * LANES)
            torch.mm(left[start:stop], right[first:last].T, out=values[:, : last - first])
            values[:, last - first :] = -torch.inf
            clear(values, own[start:stop] - first)
            # both values may be off by the error; the rest is for rounding the threshold
            best, row, column = close_to_largest(values, 3 * error, MOST_CANDIDATES)
            bounds.append(best.double() + error)
            places.append(row + start)
            found.append(column + first)
    return torch.cat(bounds), torch.cat(places), columns[torch.cat(found)]
