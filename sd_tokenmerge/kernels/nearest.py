"""Nearest neighbours within one image.

For few rows or columns, one precise product is reduced to lists. Otherwise a product in a fast
dtype says which parts of the columns matter to a row (`sd_tokenmerge.kernels.parts`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.parts import PARTS_LISTED, Columns, parts_of
from sd_tokenmerge.kernels.ranking import clear, largest_similarities
from sd_tokenmerge.kernels.search import (
    Lists,
    blocks,
    float32_error,
    join_lists,
    list_largest,
)

_DIRECT_COLUMNS = 256  # up to so many columns or rows, one precise product is cheaper
_DIRECT_ROWS = 64
_BLOCK_ELEMENTS = 1 << 19  # similarities looked at together
_FEW_ELEMENTS = 1 << 15  # of so few, the largest are found without parts


def nearest_lists(
    vectors: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    own: Tensor,
    dtype: torch.dtype,
    groups: Tensor | None = None,
) -> Lists:
    """List each row's most similar columns, `[V, C], [M], [N] -> [M, LIST_LENGTH]`.

    Args:
        vectors: `[V, C]` of length at most one, in `precise_dtype`.
        rows: `[M]` int64, which of them are rows.
        columns: `[N]` int64, which of them are columns; None means all. Lists name the places in
            `columns`.
        own: `[M]` int64; the group of columns that each row leaves out.
        dtype: of the first product; bfloat16, or that of `vectors`. Rows whose nearest column
            bfloat16 does not prove are searched for again.
        groups: `[N]` int64, the group of each column; None means its place in `columns`.
    """
    count = len(vectors) if columns is None else len(columns)
    if dtype == vectors.dtype or count <= _DIRECT_COLUMNS or len(rows) <= _DIRECT_ROWS:
        right = vectors if columns is None else vectors.index_select(0, columns)
        step = max(1, _BLOCK_ELEMENTS // count)
        found = [
            _direct(vectors.index_select(0, some), some_own, right, groups)
            for some, some_own in blocks(step, rows, own)
        ]
        return join_lists(found)
    searched = Columns(vectors, columns, groups, dtype)
    lists = searched.lists(rows, own, searched.part_maxima(rows, own))
    del searched  # its memory is of use in another search
    return _prove(lists, vectors, rows, columns, own, groups)


def mutual_nearest_lists(vectors: Tensor, dtype: torch.dtype) -> Lists:
    """`nearest_lists` of all vectors among themselves, for half of the product.

    Args:
        vectors: `[N, C]`.
        dtype: of the product.
    """
    own = torch.arange(len(vectors), device=vectors.device)
    if len(vectors) <= _DIRECT_COLUMNS:
        return nearest_lists(vectors, own, None, own, dtype)
    searched = Columns(vectors, None, None, dtype)
    lists = searched.lists(own, own, searched.mutual_part_maxima())
    del searched
    return lists if dtype == vectors.dtype else _prove(lists, vectors, own, None, own, None)


def _prove(
    lists: Lists,
    vectors: Tensor,
    rows: Tensor,
    columns: Tensor | None,
    own: Tensor,
    groups: Tensor | None,
) -> Lists:
    """Search again, in `precise_dtype`, for rows whose nearest column is not proven."""
    best = lists.value.amax(1).double() - float32_error(vectors.shape[1])
    again = torch.where(best <= lists.bound)[0]
    if len(again):
        sharper = nearest_lists(vectors, rows[again], columns, own[again], vectors.dtype, groups)
        for old, new in zip(lists, sharper, strict=True):
            old[again] = new
    return lists


def _direct(rows: Tensor, own: Tensor, columns: Tensor, groups: Tensor | None) -> Lists:
    """The lists of a block of rows by one product."""
    error = float32_error(rows.shape[1])
    num_parts = parts_of(len(columns))
    width = -(-len(columns) // num_parts)
    padded = width * num_parts
    is_wide = len(columns) > _DIRECT_COLUMNS and len(rows) * len(columns) > _FEW_ELEMENTS
    values = rows.new_empty(len(rows), padded if is_wide else len(columns))
    torch.mm(rows, columns.T, out=values[:, : len(columns)])
    values[:, len(columns) :] = -torch.inf
    if groups is None:
        clear(values, own)
    else:
        values[:, : len(columns)].masked_fill_(own.unsqueeze(1) == groups, -torch.inf)
    if not is_wide:
        return list_largest(values, error)
    # part p has the columns p, p + parts, ...: see `Columns`
    by_part = values.view(len(rows), width, num_parts)
    _, parts, rest = largest_similarities(by_part.amax(1), PARTS_LISTED)
    steps = torch.arange(0, padded, num_parts, device=rows.device)
    column = (parts.unsqueeze(2) + steps).flatten(1)
    found = list_largest(values.gather(1, column), error)
    bound = torch.maximum(found.bound, rest.double() + error)
    column = column.gather(1, found.column).clamp_(max=len(columns) - 1)
    return Lists(column, found.value, bound)
