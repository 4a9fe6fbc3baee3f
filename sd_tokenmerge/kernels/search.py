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

from sd_tokenmerge.kernels.ranking import PART_WIDTH, clear, largest

LIST_LENGTH = 4
_PARTS_LISTED = 3
_MOST_PARTS = 64
_DIRECT_COLUMNS = 256
_DIRECT_ROWS = 48
_BLOCK_ROWS = 512
_BLOCK_ELEMENTS = 1 << 22


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
    if len(columns) <= _DIRECT_COLUMNS or len(rows) <= _DIRECT_ROWS:
        limit = max(1, _BLOCK_ELEMENTS // len(columns))
        return join_lists([_direct(*block, columns, groups) for block in _blocks(rows, own, limit)])
    searched = _Columns(columns, groups, dtype)
    return _prove(searched.lists(rows, own, searched.part_maxima(rows, own)), rows, searched, own)


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
    return _prove(searched.lists(rows, own, searched.mutual_part_maxima()), rows, searched, own)


def _prove(lists: Lists, rows: Tensor, searched: _Columns, own: Tensor) -> Lists:
    """Search again, in `precise_dtype`, for rows whose nearest column is not proven."""
    if searched.filter.dtype != rows.dtype:
        best = lists.value.amax(1).double() - float32_error(rows.shape[1])
        again = torch.where(best <= lists.bound)[0]
        if len(again):
            sharper = nearest_lists(
                rows[again], searched.columns, own[again], rows.dtype, searched.column_groups
            )
            for old, new in zip(lists, sharper, strict=True):
                old[again] = new
    return lists


def _blocks(rows: Tensor, own: Tensor, size: int) -> zip[tuple[Tensor, Tensor]]:
    return zip(torch.split(rows, size), torch.split(own, size), strict=True)


def join_lists(parts: list[Lists]) -> Lists:
    """Lists of more rows, in the order given."""
    return Lists(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _direct(rows: Tensor, own: Tensor, columns: Tensor, groups: Tensor | None) -> Lists:
    values = rows @ columns.T
    _leave_out(values, own, groups)
    return _lists(values, float32_error(rows.shape[1]))


def _lists(values: Tensor, error: float) -> Lists:
    value, column, rest = largest(values, LIST_LENGTH)
    return Lists(column, value, rest.double() + error)


def _leave_out(values: Tensor, own: Tensor, groups: Tensor | None) -> None:
    if groups is None:
        clear(values, own)
    else:
        values.masked_fill_(own.unsqueeze(1) == groups, -torch.inf)


def _maxima(values: Tensor, dim: int) -> Tensor:
    if values.dtype == torch.bfloat16:
        # bit patterns of numbers >= 0 are ordered like the numbers, and integers reduce five times
        # as fast; where all are negative this gives 0, which is still an upper bound
        return values.view(torch.int16).amax(dim).clamp_(min=0).view(torch.bfloat16).float()
    return values.amax(dim)


class _Columns:
    """Columns in parts of equal width.

    The product is reduced to the largest value of each part, and only the few best parts are looked
    at column by column, in `precise_dtype`.
    """

    def __init__(self, columns: Tensor, groups: Tensor | None, dtype: torch.dtype) -> None:
        self.columns, self.column_groups = columns, groups
        self.width = PART_WIDTH * -(-len(columns) // (_MOST_PARTS * PART_WIDTH))
        self.parts = -(-len(columns) // self.width)
        padding = self.parts * self.width - len(columns)
        # a padded column is a zero vector: it raises its part's largest value to 0 at most
        self.filter = pad(columns.to(dtype), (0, 0, 0, padding))
        self.groups = None if groups is None else pad(groups, (0, padding), value=-1)
        self.step = self.width * max(1, _BLOCK_ROWS // self.width)
        self.buffer = self.filter.new_empty(self.step * len(self.filter))

    def part_maxima(self, rows: Tensor, own: Tensor) -> Tensor:
        """Largest product of each row with each part, `[M, C] -> [M, parts]`."""
        maxima = []
        for block, own_block in _blocks(rows.to(self.filter.dtype), own, self.step):
            product = self._product(block, self.filter)
            _leave_out(product, own_block, self.groups)
            maxima.append(_maxima(product.view(len(block), self.parts, self.width), 2))
        return torch.cat(maxima)

    def mutual_part_maxima(self) -> Tensor:
        """As `part_maxima` of the columns themselves."""
        count = len(self.filter)
        maxima = self.columns.new_empty(count, self.parts)
        for start in range(0, count, self.step):
            stop = min(start + self.step, count)
            first, last = start // self.width, stop // self.width
            product = self._product(self.filter[start:stop], self.filter[start:])
            product.diagonal().fill_(-torch.inf)
            parts = product.view(stop - start, -1, self.width)
            maxima[start:stop, first:] = _maxima(parts, 2)
            if stop < count:
                parts = product.view(last - first, self.width, -1)[:, :, stop - start :]
                maxima[stop:, first:last] = _maxima(parts, 1).T
        return maxima[: len(self.columns)]

    def _product(self, rows: Tensor, columns: Tensor) -> Tensor:
        product = self.buffer[: len(rows) * len(columns)].view(len(rows), len(columns))
        return torch.mm(rows, columns.T, out=product)

    def lists(self, rows: Tensor, own: Tensor, maxima: Tensor) -> Lists:
        """The lists of rows, given their `part_maxima`."""
        size = max(_BLOCK_ROWS, _BLOCK_ELEMENTS // (_PARTS_LISTED * self.width))
        parts = [torch.split(part, size) for part in (rows, own, maxima)]
        return join_lists([self._lists(*block) for block in zip(*parts, strict=True)])

    def _lists(self, rows: Tensor, own: Tensor, maxima: Tensor) -> Lists:
        _, parts, rest = largest(maxima, _PARTS_LISTED)
        values = self._columns_of_parts(rows, parts)
        if self.groups is None:
            row, place = torch.where(parts == (own // self.width).unsqueeze(1))
            values[row, place, own[row] % self.width] = -torch.inf
        else:
            inside = self.groups.view(-1, self.width)[parts] == own.view(-1, 1, 1)
            values.masked_fill_(inside, -torch.inf)
        found = _lists(values.flatten(1), float32_error(rows.shape[1]))
        part = parts.gather(1, found.column // self.width)
        column = (part * self.width + found.column % self.width).clamp_(max=len(self.columns) - 1)
        return Lists(
            column, found.value, torch.maximum(found.bound, self._upper_bound(rest.double()))
        )

    def _upper_bound(self, product: Tensor) -> Tensor:
        """What the exact similarity is at most, given the largest computed one."""
        channels = self.columns.shape[1]
        if self.filter.dtype == torch.bfloat16:
            # 8 bits each for the factors and for the result; the sum is float32
            return product + (product.abs() + 1.01) * 2.0**-8 + channels * 2.0**-22
        return product + float32_error(channels)

    def _columns_of_parts(self, rows: Tensor, parts: Tensor) -> Tensor:
        """Similarities with all columns of the given parts, `[M, L] -> [M, L, width]`."""
        listed = parts.shape[1]
        order = torch.argsort(parts.flatten(), stable=True)
        counts = torch.bincount(parts.flatten(), minlength=self.parts).tolist()
        values = rows.new_empty(len(order), self.width)
        members = torch.split(order // listed, counts)
        columns = torch.split(self.columns, self.width)
        for out, member, part in zip(torch.split(values, counts), members, columns, strict=True):
            torch.mm(rows.index_select(0, member), part.T, out=out[:, : len(part)])
            out[:, len(part) :] = -torch.inf
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return values.index_select(0, place).view(-1, listed, self.width)
