"""Nearest neighbours within each image of a batch: all images at once, or one after the other.

What a search needs besides its product, dozens of calls on short arrays, takes about a millisecond
however few rows there are. So all images are searched in one product, in full precision
(`sd_tokenmerge.kernels.images`), unless the product is so long that a fast dtype is worth its calls
(`sd_tokenmerge.kernels.nearest`). Token n of image b has the number `b * N + n`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.images import are_small, lists_by_image
from sd_tokenmerge.kernels.nearest import mutual_nearest_lists, nearest_lists
from sd_tokenmerge.kernels.search import Lists, join_lists

_SHORT_PRODUCT = 1 << 24  # multiplications per image, a quarter of a millisecond in float32


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
    batch, count, channels = vectors.shape
    if are_small(count):
        return lists_by_image(vectors, rows, columns)
    firsts = torch.arange(0, (batch + 1) * count, count, device=rows.device)
    row_ends = torch.searchsorted(rows, firsts).tolist()
    column_ends = torch.searchsorted(columns, firsts).tolist()
    slices = [
        (slice(*row_ends[image : image + 2]), slice(*column_ends[image : image + 2]))
        for image in range(batch)
        if row_ends[image] < row_ends[image + 1]
    ]
    most_rows = max(some.stop - some.start for some, _ in slices)
    most_columns = max(others.stop - others.start for _, others in slices)
    if most_rows * most_columns * channels <= _SHORT_PRODUCT:
        return lists_by_image(vectors, rows, columns)
    flat = vectors.flatten(0, 1)
    found = []
    for some, others in slices:
        row, column = rows[some], columns[others]
        left, right = flat.index_select(0, row), flat.index_select(0, column)
        lists = nearest_lists(left, right, torch.searchsorted(column, row), dtype)
        found.append(lists._replace(column=column[lists.column]))
    return join_lists(found)
