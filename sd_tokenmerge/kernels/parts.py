"""Columns in parts, of which a row looks at the few best.

The product of rows with all columns, in a fast dtype, is reduced to the largest value of each part:
without positions, that takes a fraction of the time of the product. Only the few parts with the
largest values are then looked at column by column, in full precision. What is known of all other
parts is an upper bound.
"""

from __future__ import annotations

from itertools import islice
from math import isqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from sd_tokenmerge.kernels.ranking import clear, largest_similarities, lowest_of
from sd_tokenmerge.kernels.search import (
    Lists,
    blocks,
    float32_error,
    join_lists,
    list_largest,
    union,
)

_FEWEST_PARTS = 64
PARTS_LISTED = 3
_BLOCK_ELEMENTS = 1 << 19  # similarities looked at together: 1 MiB
_MANY_CHANNELS = 160  # from here on, a longer product is worth twice as large blocks
_LISTED_AT_ONCE = 4096  # rows
_GATHERED_AT_ONCE = 1 << 17  # numbers


def parts_of(count: int) -> int:
    """How many parts N columns have: the power of two from sqrt(N) on, at least 64.

    A row reduces as many maxima as there are parts, then N / parts columns of each part it lists;
    both together are fewest where both grow like sqrt(N).
    """
    return max(_FEWEST_PARTS, 1 << (isqrt(count - 1).bit_length()))


class Columns:
    """Columns in parts of equal width.

    Attributes:
        parts: their number.
        width: columns in each part; the last ones may be padded.
        filter: `[parts * width, C]`, the columns in `dtype`.

    Args:
        vectors: `[V, C]` of length at most one, in `precise_dtype`.
        columns: `[N]` int64, which of them are columns; None means all.
        groups: `[N]` int64, the group of each column; None means its number.
        dtype: of the first product; bfloat16, or that of `vectors`.
    """

    def __init__(
        self, vectors: Tensor, columns: Tensor | None, groups: Tensor | None, dtype: torch.dtype
    ) -> None:
        if columns is None:
            columns = torch.arange(len(vectors), device=vectors.device)
        self.count = len(columns)
        self.parts = parts_of(self.count)
        self.width = -(-self.count // self.parts)
        self.padding = self.parts * self.width - self.count
        self._vectors = vectors
        self._error = float32_error(vectors.shape[1])
        self._columns = pad(columns, (0, self.padding), value=int(columns[0]))
        self.filter = self._filter(dtype)
        self.groups = self.interleaved_groups = None
        if groups is not None:
            self.groups = pad(groups, (0, self.padding), value=-1)
            self.interleaved_groups = self._interleaved(self.groups)

    def _filter(self, dtype: torch.dtype) -> Tensor:
        # the first columns of all parts, then the second ones, and so on: maxima are then taken
        # over a dimension that is not the last, for a fifth of the time
        order = self._interleaved(self._columns)
        columns = self._vectors.new_empty(len(order), self._vectors.shape[1], dtype=dtype)
        for into, some in blocks(max(1, _GATHERED_AT_ONCE // columns.shape[1]), columns, order):
            into.copy_(self._vectors.index_select(0, some))
        if self.padding:  # a zero vector raises its part's largest value to 0 at most
            number = torch.arange(len(order), device=order.device)
            columns[self._interleaved(number) >= self.count] = 0
        return columns

    def _interleaved(self, values: Tensor) -> Tensor:
        return values.view(self.parts, self.width).T.flatten()

    def _block_elements(self) -> int:
        wide = self.filter.shape[1] >= _MANY_CHANNELS
        return _BLOCK_ELEMENTS * 2 if wide else _BLOCK_ELEMENTS

    def part_maxima(self, rows: Tensor, own: Tensor) -> Tensor:
        """Largest product of each row with each part, `[M] -> [M, parts]`.

        Args:
            rows: `[M]` int64, which of the vectors.
            own: `[M]` int64, the group of columns that each leaves out.
        """
        step = max(1, self._block_elements() // len(self.filter))
        place = own % self.width * self.parts + own // self.width
        maxima = []
        for some, block_own, block_place in blocks(step, rows, own, place):
            block = self._vectors.index_select(0, some).to(self.filter.dtype)
            product = _ordered(block @ self.filter.T)
            if self.interleaved_groups is None:
                clear(product, block_place)
            else:
                inside = block_own.unsqueeze(1) == self.interleaved_groups
                product.masked_fill_(inside, lowest_of(product.dtype))
            maxima.append(product.view(len(some), self.width, self.parts).amax(1))
            del product  # before the next one takes memory
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
            del product
        maxima = torch.maximum(torch.cat(of_rows), of_columns.T)
        by_part = maxima.view(self.width, self.parts, self.parts).transpose(0, 1)
        return _values(by_part.reshape(count, self.parts)[: self.count])

    def lists(self, rows: Tensor, own: Tensor, maxima: Tensor) -> Lists:
        """The lists of rows, given their `part_maxima`, which are overwritten."""
        return join_lists(
            [
                self._lists(part, part_own, part_maxima)
                for part, part_own, part_maxima in blocks(_LISTED_AT_ONCE, rows, own, maxima)
            ]
        )

    def _lists(self, rows: Tensor, own: Tensor, maxima: Tensor) -> Lists:
        lists, beyond = self._within_best_parts(rows, own, maxima)
        best = lists.value.amax(1).double() - self._error
        again = torch.where((best <= beyond) & (best > lists.bound))[0]
        if len(again):  # the next parts may prove the nearest
            more, beyond[again] = self._within_best_parts(rows[again], own[again], maxima[again])
            both = union(Lists(*(field[again] for field in lists)), more, self.filter.shape[1])
            for old, new in zip(lists, both, strict=True):
                old[again] = new
        return lists._replace(bound=torch.maximum(lists.bound, beyond))

    def _within_best_parts(self, rows: Tensor, own: Tensor, maxima: Tensor) -> tuple[Lists, Tensor]:
        """Lists within the parts of the largest `maxima`, and a bound on the other parts."""
        _, parts, rest = largest_similarities(maxima, PARTS_LISTED)
        values = self._columns_of_parts(rows, parts)
        if self.groups is None:
            row, place = torch.where(parts == (own // self.width).unsqueeze(1))
            values[row, place, own[row] % self.width] = -torch.inf
        else:
            inside = self.groups.view(-1, self.width)[parts] == own.view(-1, 1, 1)
            values.masked_fill_(inside, -torch.inf)
        found = list_largest(values.flatten(1), self._error)
        part = parts.gather(1, found.column // self.width)
        column = (part * self.width + found.column % self.width).clamp_(max=self.count - 1)
        return found._replace(column=column), self._upper_bound(rest.double())

    def _upper_bound(self, product: Tensor) -> Tensor:
        """What the exact similarity is at most, given the largest computed one."""
        if self.filter.dtype == torch.bfloat16:
            # 8 bits each for the factors and for the result; the sum is float32
            sum_error = self.filter.shape[1] * 2.0**-22
            return product + (product.abs() + 1.01) * 2.0**-8 + sum_error
        return product + self._error

    def _columns_of_parts(self, rows: Tensor, parts: Tensor) -> Tensor:
        """Similarities with all columns of the given parts, `[M], [M, L] -> [M, L, width]`."""
        order = torch.argsort(parts.flatten())  # pairs of a row and a part, by part
        counts = torch.bincount(parts.flatten(), minlength=self.parts).tolist()
        values = self._vectors.new_empty(len(order), self.width)
        row_of_pair = rows[order // parts.shape[1]]
        pairs = zip(torch.split(values, counts), torch.split(row_of_pair, counts), strict=True)
        at_once = max(1, _GATHERED_AT_ONCE // (self.width * self._vectors.shape[1]))
        for some in torch.split(self._columns.view(self.parts, self.width), at_once):
            columns = self._vectors.index_select(0, some.flatten()).view(*some.shape, -1)
            for part, (out, of_part) in zip(columns, islice(pairs, len(some)), strict=True):
                if len(of_part):  # so few vectors stay in the cache
                    torch.mm(self._vectors.index_select(0, of_part), part.T, out=out)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        values = values.index_select(0, place).view(*parts.shape, self.width)
        if self.padding:
            self._leave_out_padding(values, parts)
        return values

    def _leave_out_padding(self, values: Tensor, parts: Tensor) -> None:
        row, nth = torch.where(parts >= self.count // self.width)
        within = torch.arange(self.width, device=parts.device)
        column = parts[row, nth].unsqueeze(1) * self.width + within
        values[row, nth] = values[row, nth].masked_fill_(column >= self.count, -torch.inf)


def _ordered(product: Tensor) -> Tensor:
    """Numbers in the order of the products, as far as these are positive; the rest is below."""
    # integers reduce five times as fast as bfloat16, whose bit patterns are ordered like themselves
    return product.view(torch.int16) if product.dtype == torch.bfloat16 else product


def _values(ordered: Tensor) -> Tensor:
    """What is `_ordered` as numbers; of integers, 0 stands for what is below 0."""
    if ordered.dtype == torch.int16:
        return ordered.clamp(min=0).view(torch.bfloat16).float()
    return ordered
