"""Lists of the most similar vectors, with an error bound that is never exceeded.

A search by products is only used as a filter: it returns a short list of candidates per row and an
upper bound on the similarity of everything that is not listed, rounding errors included. If a
decision is closer than the errors, the caller computes exact similarities
(`sd_tokenmerge.kernels.exact`). So the dtype of a product affects speed, never results.

On a CPU, a long search takes two steps. A product in the fastest dtype is reduced to the largest
value of each of some 64 groups of columns, without positions, at a fraction of the cost of the
product. The few best groups of each row are then multiplied again in full precision. A short
search, and every search on an accelerator, is one product in full precision.
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sd_tokenmerge.kernels.vectors import blocks

LIST_LENGTH = 4
_FEW_PRODUCTS = 1 << 26  # multiplications up to which a search is one product in full precision
_FEWEST_GROUPS = 64
_GROUPS_LISTED = 3
_BLOCK_ELEMENTS = 1 << 20  # similarities in one block, on a CPU
_DEVICE_BLOCK_ELEMENTS = 1 << 26
_GATHERED_ROWS = 512
_ROWS_LISTED_AT_ONCE = 2048
_WIDE = 512  # rows of more values are reduced to the largest of each group first


class Lists(NamedTuple):
    """The most similar columns of each of M rows."""

    column: Tensor
    """`[M, LIST_LENGTH]` int64, distinct; arbitrary columns where `value` is -inf."""
    value: Tensor
    """`[M, LIST_LENGTH]` similarities, each within `float32_error` of the exact one."""
    bound: Tensor
    """`[M]` float64: no column that is not listed is more similar than this."""


def float32_error(channels: int) -> float:
    """Largest error of a float32 dot product of two vectors of length at most one.

    `(C + 8) 2^-24`: C roundings of the sum in any order, those of the two factors to float32, and a
    margin for a few more (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1).
    """
    return (channels + 8) * 2.0**-24


def search_dtype(device: torch.device) -> torch.dtype:
    """The dtype of the first product of a long search.

    bfloat16 where the CPU multiplies it natively (at 2 to 4 times the speed), else float32.
    """
    native = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    has_bfloat16 = any(getattr(torch.cpu, name, bool)() for name in native)
    return torch.bfloat16 if device.type == "cpu" and has_bfloat16 else torch.float32


def precise_dtype(device: torch.device) -> torch.dtype:
    """float32, or float64 where torch is set to multiply float32 matrices less precisely."""
    name = "cuda" if device.type == "cuda" else "mkldnn"
    matmul = getattr(getattr(torch.backends, name), "matmul", None)
    setting = getattr(matmul, "fp32_precision", None)
    if setting is None:  # before torch 2.9
        setting = "ieee" if torch.get_float32_matmul_precision() == "highest" else "reduced"
    return torch.float32 if setting in ("none", "ieee") else torch.float64


def nearest_lists(
    vectors: Tensor, rows: Tensor, columns: Tensor, component: Tensor | None = None
) -> Lists:
    """List each row's most similar columns, `[V, C], [M], [N] -> [M, LIST_LENGTH]`.

    Args:
        vectors: `[V, C]` of length at most one, in `precise_dtype`.
        rows: `[M]` int64, indices of the rows' vectors; M is at least 1.
        columns: `[N]` int64, ascending, indices of the columns' vectors; include all rows.
        component: `[V]` int64; a row's list leaves out the columns of its own component. None means
            that it leaves out the row itself.
    """
    if not vectors.is_cpu or len(rows) * len(columns) * vectors.shape[1] <= _FEW_PRODUCTS:
        return _direct_lists(vectors, rows, columns, component)
    coarse = _CoarseProduct(vectors, columns)
    maxima = coarse.maxima(rows, component)
    return _lists_by_groups(coarse, maxima, rows, component)


def mutual_lists(vectors: Tensor) -> Lists:
    """`nearest_lists` of all vectors among themselves; takes half of the product if it is long."""
    everyone = torch.arange(len(vectors), device=vectors.device)
    if not vectors.is_cpu or len(vectors) * vectors.numel() <= _FEW_PRODUCTS:
        return _direct_lists(vectors, everyone, everyone, None)
    coarse = _CoarseProduct(vectors, everyone)
    return _lists_by_groups(coarse, coarse.mutual_maxima(), everyone, None)


def list_largest(values: Tensor, error: float) -> Lists:
    """The lists of rows whose similarities to all columns are given.

    Args:
        values: `[M, N]` in [-1, 1] or -inf, float32 or float64; overwritten.
        error: their largest distance from the exact similarities.
    """
    count = values.shape[1]
    if count > _WIDE:
        # column n is in group n modulo the number of groups, so that maxima are taken over a
        # dimension that is not the last, for a fraction of the time
        groups = _num_groups(count)
        whole = count // groups * groups
        maxima = values[:, :whole].view(len(values), -1, groups).amax(1)
        head = maxima[:, : count - whole]
        torch.maximum(head, values[:, whole:], out=head)
        _, group, beyond = _largest(maxima, LIST_LENGTH)
        steps = torch.arange(0, count, groups, device=values.device)
        column = (group.unsqueeze(2) + steps).flatten(1)
        missing = column >= count
        values = values.gather(1, column.clamp_(max=count - 1)).masked_fill_(missing, -torch.inf)
    else:
        values = pad(values, (0, max(0, LIST_LENGTH - count)), value=-torch.inf)
        column = torch.arange(values.shape[1], device=values.device).clamp_(max=count - 1)
        column, beyond = column.expand(values.shape), values.new_tensor(-torch.inf)
    value, place, rest = _largest(values, LIST_LENGTH)
    return Lists(column.gather(1, place), value, torch.maximum(rest, beyond).double() + error)


class _CoarseProduct:
    """Products of rows with some columns in `search_dtype`, reduced to maxima of column groups.

    Column n is in group n modulo `groups`.

    Attributes:
        vectors: `[V, C]` of length at most one, in `precise_dtype`.
        columns: `[N]` int64, indices of the columns' vectors.
        groups: number of groups.
        is_precise: whether the products are in the dtype of `vectors`.
    """

    def __init__(self, vectors: Tensor, columns: Tensor) -> None:
        self.vectors, self.columns = vectors, columns
        self.groups = _num_groups(len(columns))
        dtype = search_dtype(vectors.device)
        self.is_precise = dtype != torch.bfloat16
        self._dtype = vectors.dtype if self.is_precise else dtype
        # zero vectors fill the groups up; they raise a maximum to 0 at most
        padded = -(-len(columns) // self.groups) * self.groups
        self._factor = vectors.new_zeros(padded, vectors.shape[1], dtype=self._dtype)
        for into, some in blocks(_GATHERED_ROWS, self._factor[: len(columns)], columns):
            into.copy_(vectors.index_select(0, some))

    def maxima(self, rows: Tensor, component: Tensor | None) -> Tensor:
        """Largest product of each row with each group, `[M] -> [M, groups]`; see `upper_bound`."""
        found = []
        for part in torch.split(rows, max(1, _BLOCK_ELEMENTS // len(self._factor))):
            product = _ordered(self.vectors.index_select(0, part).to(self._dtype) @ self._factor.T)
            _leave_out(product[:, : len(self.columns)], part, self.columns, component)
            found.append(product.view(len(part), -1, self.groups).amax(1))
            del product  # before the next one takes memory
        return _numbers(torch.cat(found))

    def mutual_maxima(self) -> Tensor:
        """`maxima` of the columns themselves, each leaving out itself."""
        count = len(self._factor)
        step = self.groups * max(1, _BLOCK_ELEMENTS // (count * self.groups))
        of_rows, of_columns = [], _ordered(self._factor.new_zeros(self.groups, count))
        of_columns.fill_(_lowest(of_columns.dtype))
        for start in range(0, count, step):
            stop = min(start + step, count)
            product = _ordered(self._factor[start:stop] @ self._factor[start:].T)
            product.diagonal().fill_(_lowest(product.dtype))
            of_rows.append(product.view(stop - start, -1, self.groups).amax(1))
            later = product.view(-1, self.groups, count - start)[:, :, stop - start :]
            if stop < count:
                torch.maximum(of_columns[:, stop:], later.amax(0), out=of_columns[:, stop:])
            del product, later
        maxima = torch.maximum(torch.cat(of_rows), of_columns.T)
        return _numbers(maxima[: len(self.columns)])

    def upper_bound(self, product: Tensor) -> Tensor:
        """An upper bound on the exact similarity, given a computed product, float64."""
        product, channels = product.double(), self.vectors.shape[1]
        if self.is_precise:
            return product + float32_error(channels)
        # 8 bits each for the factors and for the result; the sum is float32
        return product + (product.abs() + 1.01) * 2.0**-8 + channels * 2.0**-22


def _lists_by_groups(
    coarse: _CoarseProduct, maxima: Tensor, rows: Tensor, component: Tensor | None
) -> Lists:
    """Lists of rows whose `maxima` are given, from the best groups of each."""
    found = [
        _lists_of_best_groups(coarse, some_maxima, some, component)
        for some_maxima, some in blocks(_ROWS_LISTED_AT_ONCE, maxima, rows)
    ]
    lists = Lists(*(torch.cat(field) for field in zip(*found, strict=True)))
    vectors, columns = coarse.vectors, coarse.columns
    if coarse.is_precise:
        return lists
    del coarse  # its memory is needed for the search below
    best = lists.value.amax(1).double() - float32_error(vectors.shape[1])
    unproven = torch.where(best <= lists.bound)[0]
    if len(unproven):
        sharper = _direct_lists(vectors, rows[unproven], columns, component)
        for old, new in zip(lists, sharper, strict=True):
            old[unproven] = new
    return lists


def _lists_of_best_groups(
    coarse: _CoarseProduct, maxima: Tensor, rows: Tensor, component: Tensor | None
) -> Lists:
    vectors, columns, groups = coarse.vectors, coarse.columns, coarse.groups
    _, group, beyond = _largest(maxima, _GROUPS_LISTED)
    order = torch.argsort(group.flatten())  # pairs of a row and a group, by group
    counts = torch.bincount(group.flatten(), minlength=groups).tolist()
    width = -(-len(columns) // groups)
    values = vectors.new_full((len(order), width), -torch.inf)
    pair_rows = rows[order // _GROUPS_LISTED]
    pairs = zip(torch.split(values, counts), torch.split(pair_rows, counts), strict=True)
    for number, (into, some) in enumerate(pairs):
        members = columns[number::groups]  # few enough to stay in the cache
        product = into[:, : len(members)]
        torch.mm(vectors.index_select(0, some), vectors.index_select(0, members).T, out=product)
        if component is not None:
            _leave_out(product, some, members, component)
    values = values.index_select(0, torch.argsort(order))
    if component is None:
        own = torch.searchsorted(columns, rows)
        row, nth = torch.where(group == (own % groups).unsqueeze(1))
        values[row * _GROUPS_LISTED + nth, own[row] // groups] = -torch.inf
    value, place, rest = _largest(values.view(len(rows), -1), LIST_LENGTH)
    column = group.gather(1, place // width) + place % width * groups
    error = float32_error(vectors.shape[1])
    bound = torch.maximum(rest.double() + error, coarse.upper_bound(beyond))
    return Lists(columns[column.clamp_(max=len(columns) - 1)], value, bound)


def _direct_lists(
    vectors: Tensor, rows: Tensor, columns: Tensor, component: Tensor | None
) -> Lists:
    """See `nearest_lists`; by one product in full precision, in blocks of rows."""
    factor = vectors if len(columns) == len(vectors) else vectors.index_select(0, columns)
    elements = _BLOCK_ELEMENTS // 4 if vectors.is_cpu else _DEVICE_BLOCK_ELEMENTS
    found = []
    for part in torch.split(rows, max(1, elements // len(columns))):
        values = vectors.index_select(0, part) @ factor.T
        _leave_out(values, part, columns, component)
        found.append(list_largest(values, float32_error(vectors.shape[1])))
        del values
    column, value, bound = (torch.cat(field) for field in zip(*found, strict=True))
    return Lists(columns[column], value, bound)


def _leave_out(values: Tensor, rows: Tensor, columns: Tensor, component: Tensor | None) -> None:
    """Set the values that a row's list leaves out to the lowest, `[M, N], [M], [N]`."""
    lowest = _lowest(values.dtype)
    if component is None:
        values.scatter_(1, torch.searchsorted(columns, rows).unsqueeze(1), lowest)
    else:
        values.masked_fill_(component[rows].unsqueeze(1) == component[columns], lowest)


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """About the `count` largest of each row, and exactly the largest of the rest.

    A column's position is written into the last bits of its value, as integers in the order of the
    values: their maximum is found in a sixth of the time of a maximum with its position. So values
    that differ by little more than 2^-14 may be taken for each other.

    Args:
        values: `[M, N]` above -2 or -inf, N at least `count`; overwritten.
        count: L.

    Returns:
        Values and their columns, `[M, L]`, in no order; the largest of the rest, `[M]`.
    """
    width = values.shape[1]
    bits = (width - 1).bit_length()
    keys = (values + 2).float().view(torch.int32)  # the bits of positive numbers are ordered
    keys.bitwise_and_(-1 << bits)
    keys.bitwise_or_(torch.arange(width, dtype=torch.int32, device=values.device))
    found = []
    for _ in range(count):
        column = keys.amax(1, keepdim=True).bitwise_and_((1 << bits) - 1).long()
        keys.scatter_(1, column, _lowest(keys.dtype))
        found.append(column)
    columns = torch.cat(found, 1)
    best = values.gather(1, columns)
    values.scatter_(1, columns, -torch.inf)
    return best, columns, values.amax(1)


def _num_groups(count: int) -> int:
    """The power of two from sqrt(N) on, at least 64.

    A row reduces as many maxima as there are groups, then the N / groups columns of each group it
    lists; both together are fewest where both grow like sqrt(N).
    """
    return max(_FEWEST_GROUPS, 1 << isqrt(count - 1).bit_length())


def _lowest(dtype: torch.dtype) -> float:
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _ordered(product: Tensor) -> Tensor:
    """Numbers that are ordered like the products where these are positive, and lower elsewhere."""
    # integers reduce five times as fast as bfloat16, whose bit patterns are ordered like themselves
    return product.view(torch.int16) if product.dtype == torch.bfloat16 else product


def _numbers(ordered: Tensor) -> Tensor:
    """Undo `_ordered`; 0 stands for products below 0 that were ordered as integers."""
    if ordered.dtype == torch.int16:
        return ordered.clamp(min=0).view(torch.bfloat16).float()
    return ordered
