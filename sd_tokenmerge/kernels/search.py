"""Nearest neighbours by one blocked product, with an error bound that is never exceeded.

The product is taken in a fast dtype and only ever used as a filter: what it returns are short lists
of candidates and, for everything not listed, an upper bound that includes the rounding errors.
Where a decision is closer than the errors, the caller computes exact similarities
(`sd_tokenmerge.kernels.exact`). So the dtype decides about speed, never about the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LIST_LENGTH = 4
_PARTS_LISTED = 3
_PART_WIDTH = 64
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
        dtype: of the first product; bfloat16 or float32.
        groups: `[N]` int64, the group of each column; None means its number.
    """
    if len(columns) <= _DIRECT_COLUMNS or len(rows) <= _DIRECT_ROWS:
        limit = max(1, _BLOCK_ELEMENTS // len(columns))
        parts = [_direct(*block, columns, groups) for block in _blocks(rows, own, limit)]
    else:
        searched = _Columns(columns, groups, dtype)
        limit = max(_BLOCK_ROWS, _BLOCK_ELEMENTS // (_PARTS_LISTED * searched.width))
        parts = [searched.lists(*block) for block in _blocks(rows, own, limit)]
    return Lists(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _blocks(rows: Tensor, own: Tensor, size: int) -> zip[tuple[Tensor, Tensor]]:
    return zip(torch.split(rows, size), torch.split(own, size), strict=True)


def _direct(rows: Tensor, own: Tensor, columns: Tensor, groups: Tensor | None) -> Lists:
    values = rows @ columns.T
    _leave_out(values, own, groups)
    return _largest(values, LIST_LENGTH, float32_error(rows.shape[1]))


def _leave_out(values: Tensor, own: Tensor, groups: Tensor | None) -> None:
    if groups is None:
        values.scatter_(1, own.unsqueeze(1), -torch.inf)
    else:
        values.masked_fill_(own.unsqueeze(1) == groups, -torch.inf)


def _largest(values: Tensor, count: int, error: float) -> Lists:
    """The `count` largest of each row and a bound on the rest; overwrites `values`."""
    best, index = [], []
    for _ in range(count):  # `topk` sorts and takes twice as long
        value, position = values.max(1)
        best.append(value)
        index.append(position)
        values.scatter_(1, position.unsqueeze(1), -torch.inf)
    return Lists(torch.stack(index, 1), torch.stack(best, 1), values.amax(1).double() + error)


class _Columns:
    """Columns in parts of equal width.

    The product is reduced to the largest value of each part, and only the few best parts are looked
    at column by column, in `precise_dtype`.
    """

    def __init__(self, columns: Tensor, groups: Tensor | None, dtype: torch.dtype) -> None:
        self.columns = columns
        self.width = _PART_WIDTH * -(-len(columns) // (_MOST_PARTS * _PART_WIDTH))
        self.parts = -(-len(columns) // self.width)
        padding = self.parts * self.width - len(columns)
        # a padded column is a zero vector: it raises its part's largest value to 0 at most
        self.filter = torch.nn.functional.pad(columns.to(dtype), (0, 0, 0, padding))
        if groups is not None:
            groups = torch.nn.functional.pad(groups, (0, padding), value=-1)
        self.groups = groups

    def lists(self, rows: Tensor, own: Tensor) -> Lists:
        """The lists of a block of rows."""
        maxima = [self._part_maxima(*block) for block in _blocks(rows, own, _BLOCK_ROWS)]
        best = _largest(torch.cat(maxima), _PARTS_LISTED, 0.0)
        values = self._columns_of_parts(rows, best.column)
        if self.groups is None:
            row, place = torch.where(best.column == (own // self.width).unsqueeze(1))
            values[row, place, own[row] % self.width] = -torch.inf
        else:
            inside = self.groups.view(-1, self.width)[best.column] == own.view(-1, 1, 1)
            values.masked_fill_(inside, -torch.inf)
        found = _largest(values.flatten(1), LIST_LENGTH, float32_error(rows.shape[1]))
        part = best.column.gather(1, found.column // self.width)
        column = (part * self.width + found.column % self.width).clamp_(max=len(self.columns) - 1)
        return Lists(column, found.value, torch.maximum(found.bound, self._upper_bound(best.bound)))

    def _part_maxima(self, rows: Tensor, own: Tensor) -> Tensor:
        """Largest product of each row with each part, `[M, C] -> [M, parts]`."""
        product = rows.to(self.filter.dtype) @ self.filter.T
        _leave_out(product, own, self.groups)
        product = product.view(len(rows), self.parts, self.width)
        if product.dtype == torch.bfloat16:
            # bit patterns of numbers >= 0 are ordered like the numbers, and integers reduce five
            # times as fast; a part of negative numbers gets 0, which is still an upper bound
            return product.view(torch.int16).amax(2).clamp_(min=0).view(torch.bfloat16).float()
        return product.amax(2)

    def _upper_bound(self, product: Tensor) -> Tensor:
        """What the exact similarity is at most, given the largest computed one."""
        channels = self.columns.shape[1]
        if (
            self.filter.dtype == torch.bfloat16
        ):  # 8 bits: both factors, the sum, and the result rounded
            return product + (product.abs() + 1.01) * 2.0**-8 + channels * 2.0**-22
        return product + float32_error(channels)

    def _columns_of_parts(self, rows: Tensor, parts: Tensor) -> Tensor:
        """Similarities with all columns of the given parts, `[M, L] -> [M, L, width]`."""
        listed = parts.shape[1]
        order = torch.argsort(parts.flatten(), stable=True)
        counts = torch.bincount(parts.flatten(), minlength=self.parts).tolist()
        values = rows.new_full((len(order), self.width), -torch.inf)
        members = torch.split(order // listed, counts)
        columns = torch.split(self.columns, self.width)
        for out, member, part in zip(torch.split(values, counts), members, columns, strict=True):
            torch.mm(rows.index_select(0, member), part.T, out=out[:, : len(part)])
        return torch.empty_like(values).index_copy_(0, order, values).view(-1, listed, self.width)
