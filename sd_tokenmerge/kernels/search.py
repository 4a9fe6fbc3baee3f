"""Nearest neighbours by a blocked product, with an error bound that is never exceeded.

The product is taken in a fast dtype and only ever used as a filter: what it returns are short lists
of candidates and, for everything not listed, an upper bound that includes the rounding errors.
Where a decision is closer than the errors, the caller computes exact similarities
(`sd_tokenmerge.kernels.exact`). So the dtype decides about speed, never about the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sd_tokenmerge.kernels.ranking import clear, largest, largest_similarities, lowest_of

LIST_LENGTH = 4
_PARTS = 64
_PARTS_LISTED = 3
_DIRECT_COLUMNS = 256  # up to so many columns or rows, one precise product is cheaper
_DIRECT_ROWS = 64
_BLOCK_ELEMENTS = 1 << 19  # similarities looked at together
_LISTED_AT_ONCE = 1024  # rows
_FEW_ELEMENTS = 1 << 15
_MANY_CHANNELS = 160
_FEW_PAIRS = 1 << 12
_WASTE = 2.5


class Lists(NamedTuple):
    """The most similar columns of each of M rows."""

    column: Tensor
    """`[M, LIST_LENGTH]` int64 column numbers; arbitrary where `value` is -inf."""
    value: Tensor
    """`[M, LIST_LENGTH]` similarities, each within `float32_error` of the exact one."""
    bound: Tensor
    """`[M]` float64: no column that is not listed is more similar than this."""


def float32_error(channels: int) -> float:
    """How far a float32 dot product of two vectors of length at most one can be off.

    `(C + 8) 2^-24`: C roundings of the sum in any order, those of the two factors to float32, and a
    few to spare (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1).
    """
    return (channels + 8) * 2.0**-24


def bfloat16_error(channels: int) -> float:
    """As `float32_error`, where factors and result are bfloat16 and the sum is float32.

    The factors are off by 2^-9 of their length each, and so is the result.
    """
    return 1.02 * (2.0**-8 + 2.0**-9) + channels * 2.0**-22


def default_search_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively (at 4 to 8 times the speed), else float32."""
    if device.type != "cpu":
        return torch.float32
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_bfloat16 = any(getattr(torch.cpu, name, bool)() for name in native)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def precise_dtype(device: torch.device) -> torch.dtype:
    """float32, or float64 where torch is set to multiply float32 matrices less precisely."""
    name = "cuda" if device.type == "cuda" else "mkldnn"
    matmul = getattr(getattr(torch.backends, name), "matmul", None)
    setting = getattr(matmul, "fp32_precision", None)
    if setting is None:  # before torch 2.9
        setting = "ieee" if torch.get_float32_matmul_precision() == "highest" else "reduced"
    return torch.float32 if setting in ("none", "ieee") else torch.float64


def nearest_lists(
    rows: Tensor, columns: Tensor, own: Tensor, dtype: torch.dtype, groups: Tensor | None = None
) -> Lists:
    """List each row's most similar columns, `[M, C], [N, C] -> [M, LIST_LENGTH]`.

    Args:
        rows: `[M, C]` of length at most one, in `precise_dtype`.
        columns: `[N, C]` likewise.
        own: `[M]` int64; the group of columns that each row leaves out.
        dtype: of the first product; bfloat16, or that of `rows`. Rows whose nearest column bfloat16
            does not prove are searched for again.
        groups: `[N]` int64, the group of each column; None means its number.
    """
    if dtype == rows.dtype or len(columns) <= _DIRECT_COLUMNS or len(rows) <= _DIRECT_ROWS:
        step = max(1, _BLOCK_ELEMENTS // len(columns))
        found = [_direct(*block, columns, groups) for block in _blocks(step, rows, own)]
        return join_lists(found)
    searched = _Columns(columns, groups, dtype)
    lists = searched.lists(rows, own, searched.part_maxima(rows, own))
    return _prove(lists, rows, own, columns, groups, dtype)


def mutual_nearest_lists(rows: Tensor, dtype: torch.dtype) -> Lists:
    """`nearest_lists` of all rows among themselves, for half of the product.

    Args:
        rows: `[N, C]`.
        dtype: of the product.
    """
    own = torch.arange(len(rows), device=rows.device)
    if len(rows) <= _DIRECT_COLUMNS:
        return nearest_lists(rows, rows, own, dtype)
    searched = _Columns(rows, None, dtype)
    lists = searched.lists(rows, own, searched.mutual_part_maxima())
    return _prove(lists, rows, own, rows, None, dtype)


def _prove(
    lists: Lists,
    rows: Tensor,
    own: Tensor,
    columns: Tensor,
    groups: Tensor | None,
    dtype: torch.dtype,
) -> Lists:
    """Search again, in `precise_dtype`, for rows whose nearest column is not proven."""
    if dtype != rows.dtype:
        best = lists.value.amax(1).double() - float32_error(rows.shape[1])
        again = torch.where(best <= lists.bound)[0]
        if len(again):
            sharper = nearest_lists(rows[again], columns, own[again], rows.dtype, groups)
            for old, new in zip(lists, sharper, strict=True):
                old[again] = new
    return lists


def _blocks(size: int, *values: Tensor) -> zip[tuple[Tensor, ...]]:
    return zip(*(torch.split(part, size) for part in values), strict=True)


def join_lists(parts: list[Lists]) -> Lists:
    """Lists of more rows, in the order given."""
    return Lists(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _direct(rows: Tensor, own: Tensor, columns: Tensor, groups: Tensor | None) -> Lists:
    """The lists of a block of rows by one product."""
    error = float32_error(rows.shape[1])
    width = -(-len(columns) // _PARTS)
    padded = width * _PARTS
    is_wide = len(columns) > _DIRECT_COLUMNS and len(rows) * len(columns) > _FEW_ELEMENTS
    values = rows.new_empty(len(rows), padded if is_wide else len(columns))
    torch.mm(rows, columns.T, out=values[:, : len(columns)])
    values[:, len(columns) :] = -torch.inf
    if groups is None:
        clear(values, own)
    else:
        values[:, : len(columns)].masked_fill_(own.unsqueeze(1) == groups, -torch.inf)
    if not is_wide:
        return _lists(values, error)
    # part p has the columns p, p + parts, ...: see `_Columns`
    by_part = values.view(len(rows), width, _PARTS)
    _, parts, rest = largest_similarities(by_part.amax(1), _PARTS_LISTED)
    steps = torch.arange(0, padded, _PARTS, device=rows.device)
    column = (parts.unsqueeze(2) + steps).flatten(1)
    found = _lists(values.gather(1, column), error)
    bound = torch.maximum(found.bound, rest.double() + error)
    column = column.gather(1, found.column).clamp_(max=len(columns) - 1)
    return Lists(column, found.value, bound)


def _lists(values: Tensor, error: float) -> Lists:
    value, column, rest = largest_similarities(values, LIST_LENGTH)
    return Lists(column, value, rest.double() + error)


def _union(one: Lists, other: Lists, channels: int) -> Lists:
    """Lists of the same rows over two disjoint sets of columns, as one."""
    column = torch.cat((one.column, other.column), 1)
    value, place, rest = largest(torch.cat((one.value, other.value), 1), LIST_LENGTH)
    rest = rest.double() + float32_error(channels)
    bound = torch.maximum(rest, torch.maximum(one.bound, other.bound))
    return Lists(column.gather(1, place), value, bound)


def _ordered(product: Tensor) -> Tensor:
    """Numbers in the order of the products, as far as these are positive; the rest is below."""
    # integers reduce five times as fast as bfloat16, whose bit patterns are ordered like themselves
    return product.view(torch.int16) if product.dtype == torch.bfloat16 else product


def _values(ordered: Tensor) -> Tensor:
    """What is `_ordered` as numbers; of integers, 0 stands for what is below 0."""
    if ordered.dtype == torch.int16:
        return ordered.clamp(min=0).view(torch.bfloat16).float()
    return ordered


class _Columns:
    """Columns in parts of equal width.

    The product with all columns is reduced to the largest value of each part, and only the few best
    parts are looked at column by column, in the precision of `columns`.

    Args:
        columns: `[N, C]`, in `precise_dtype`.
        groups: see `nearest_lists`.
        dtype: of the first product.
    """

    def __init__(self, columns: Tensor, groups: Tensor | None, dtype: torch.dtype) -> None:
        self.count, channels = columns.shape
        self.width = -(-self.count // _PARTS)
        self.parts = _PARTS
        self.padding = self.parts * self.width - self.count
        # a padded column is a zero vector: it raises its part's largest value to 0 at most
        padded = pad(columns, (0, 0, 0, self.padding)) if self.padding else columns
        self.columns = padded.view(self.parts, self.width, channels)
        # the first columns of all parts, then the second ones, and so on: maxima are then taken
        # over a dimension that is not the last, for a fifth of the time
        self.filter = self._interleaved(padded).to(dtype)
        self.groups = self.interleaved_groups = None
        if groups is not None:
            self.groups = pad(groups, (0, self.padding), value=-1)
            self.interleaved_groups = self._interleaved(self.groups)

    def _interleaved(self, values: Tensor) -> Tensor:
        by_part = values.view(self.parts, self.width, *values.shape[1:])
        return by_part.transpose(0, 1).reshape(values.shape)

    def _block_elements(self) -> int:
        wide = self.columns.shape[2] >= _MANY_CHANNELS
        return _BLOCK_ELEMENTS * 2 if wide else _BLOCK_ELEMENTS

    def part_maxima(self, rows: Tensor, own: Tensor) -> Tensor:
        """Largest product of each row with each part, `[M, C] -> [M, parts]`."""
        step = max(1, self._block_elements() // len(self.filter))
        place = own % self.width * self.parts + own // self.width
        maxima = []
        for block, block_own, block_place in _blocks(step, rows.to(self.filter.dtype), own, place):
            product = _ordered(block @ self.filter.T)
            if self.interleaved_groups is None:
                clear(product, block_place)
            else:
                inside = block_own.unsqueeze(1) == self.interleaved_groups
                product.masked_fill_(inside, lowest_of(product.dtype))
            maxima.append(product.view(len(block), self.width, self.parts).amax(1))
        return _values(torch.cat(maxima))

    def mutual_part_maxima(self) -> Tensor:
        """As `part_maxima` of the columns themselves."""
        count = len(self.filter)
        step = self.parts * max(1, self._block_elements() // (count * self.parts))
        of_rows, of_columns = [], _ordered(self.filter.new_zeros(self.parts, count))
        of_columns.fill_(lowest_of(of_columns.dtype))
        for start in range(0, count, step):
            stop = min(start + step, count)
            product = _ordered(self.filter[start:stop] @ self.filter[start:].T)
            product.diagonal().fill_(lowest_of(product.dtype))
            of_rows.append(product.view(stop - start, -1, self.parts).amax(1))
            if stop < count:
                below = product.view(-1, self.parts, count - start)[:, :, stop - start :].amax(0)
                torch.maximum(of_columns[:, stop:], below, out=of_columns[:, stop:])
        maxima = torch.maximum(torch.cat(of_rows), of_columns.T)
        by_part = maxima.view(self.width, self.parts, self.parts).transpose(0, 1)
        return _values(by_part.reshape(count, self.parts)[: self.count])

    def lists(self, rows: Tensor, own: Tensor, maxima: Tensor) -> Lists:
        """The lists of rows, given their `part_maxima`, which are overwritten."""
        return join_lists(
            [self._lists(*block) for block in _blocks(_LISTED_AT_ONCE, rows, own, maxima)]
        )

    def _lists(self, rows: Tensor, own: Tensor, maxima: Tensor) -> Lists:
        lists, beyond = self._within_best_parts(rows, own, maxima)
        best = lists.value.amax(1).double() - float32_error(rows.shape[1])
        again = torch.where((best <= beyond) & (best > lists.bound))[0]
        if len(again):  # the next parts may prove the nearest
            more, beyond[again] = self._within_best_parts(rows[again], own[again], maxima[again])
            both = _union(Lists(*(field[again] for field in lists)), more, rows.shape[1])
            for old, new in zip(lists, both, strict=True):
                old[again] = new
        return lists._replace(bound=torch.maximum(lists.bound, beyond))

    def _within_best_parts(self, rows: Tensor, own: Tensor, maxima: Tensor) -> tuple[Lists, Tensor]:
        """Lists within the parts of the largest `maxima`, and a bound on the other parts."""
        _, parts, rest = largest_similarities(maxima, _PARTS_LISTED)
        values = self._columns_of_parts(rows, parts)
        if self.groups is None:
            row, place = torch.where(parts == (own // self.width).unsqueeze(1))
            values[row, place, own[row] % self.width] = -torch.inf
        else:
            inside = self.groups.view(-1, self.width)[parts] == own.view(-1, 1, 1)
            values.masked_fill_(inside, -torch.inf)
        found = _lists(values.flatten(1), float32_error(rows.shape[1]))
        part = parts.gather(1, found.column // self.width)
        column = (part * self.width + found.column % self.width).clamp_(max=self.count - 1)
        return found._replace(column=column), self._upper_bound(rest.double())

    def _upper_bound(self, product: Tensor) -> Tensor:
        """What the exact similarity is at most, given the largest computed one."""
        channels = self.columns.shape[2]
        if self.filter.dtype == torch.bfloat16:
            # 8 bits each for the factors and for the result; the sum is float32
            return product + (product.abs() + 1.01) * 2.0**-8 + channels * 2.0**-22
        return product + float32_error(channels)

    def _columns_of_parts(self, rows: Tensor, parts: Tensor) -> Tensor:
        """Similarities with all columns of the given parts, `[M, L] -> [M, L, width]`."""
        part = parts.flatten()
        order = torch.argsort(part)
        row = order // parts.shape[1]
        counts = torch.bincount(part, minlength=self.parts)
        most = int(counts.amax())
        if most * self.parts <= max(_FEW_PAIRS, _WASTE * len(order)):
            first = torch.arange(0, most * self.parts, most) - counts.cumsum(0).sub_(counts)
            slot = first[part[order]].add_(torch.arange(len(order)))
            table = row.new_zeros(self.parts * most)
            table[slot] = row
            left = rows.index_select(0, table).view(self.parts, most, -1)
            values = torch.bmm(left, self.columns.mT)
            place = torch.empty_like(order)
            place[order] = slot
        else:  # few parts are those of many rows
            values = rows.new_empty(len(order), self.width)
            ends = counts.tolist()
            left = rows.index_select(0, row)
            for out, of_part, columns in zip(
                torch.split(values, ends), torch.split(left, ends), self.columns, strict=True
            ):
                torch.mm(of_part, columns.T, out=out)
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order))
        values = values.view(-1, self.width).index_select(0, place).view(*parts.shape, self.width)
        if self.padding:
            row, nth = torch.where(parts >= self.count // self.width)
            column = parts[row, nth].unsqueeze(1) * self.width + torch.arange(self.width)
            values[row, nth] = values[row, nth].masked_fill_(column >= self.count, -torch.inf)
        return values
