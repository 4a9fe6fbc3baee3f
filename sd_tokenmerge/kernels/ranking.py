"""Largest values of each row of a block, reduced in parts.

Reducing a row to the largest value of each part, without positions, takes a tenth of the time of an
arg-max; positions are then looked up in the few parts that matter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

PART_WIDTH = 64
LANES = 64
_MANY_VALUES = 1 << 15  # of fewer, looking at all is as fast as finding out where to look
_FEW_VALUES = 1 << 13  # of fewer, `largest` is as fast
_MOST_COLUMNS = 512  # so many positions leave 14 bits for the value


def lowest_of(dtype: torch.dtype) -> float:
    """What no value of this dtype is below."""
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def highest_of(dtype: torch.dtype) -> float:
    """What no value of this dtype is above."""
    return torch.inf if dtype.is_floating_point else torch.iinfo(dtype).max


def clear(values: Tensor, column: Tensor) -> None:
    """Set one value of each row to the lowest, `[M, N], [M]`."""
    values.scatter_(1, column.unsqueeze(1), lowest_of(values.dtype))


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` largest of each row, and the largest of the rest; overwrites `values`.

    Returns:
        Values `[M, count]` in descending order, their columns, and `[M]`.
    """
    best, column = [], []
    for _ in range(count):  # `topk` takes twice as long
        value, position = values.max(1)
        best.append(value)
        column.append(position)
        clear(values, position)
    return torch.stack(best, 1), torch.stack(column, 1), values.amax(1)


def largest_similarities(values: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `largest`, for values above -2 or -inf; the choice is right but for about 2^-14.

    The bound, the largest of the rest, is exact. A row's position is written into the last bits of
    its values, as integers in the order of the values: their largest is found at a sixth of the
    time of a maximum with its position.
    """
    width = values.shape[1]
    if values.numel() < _FEW_VALUES or width > _MOST_COLUMNS:
        return largest(values, count)
    bits = (width - 1).bit_length()
    keys = (values + 2).float().view(torch.int32)  # the bits of positive numbers are ordered
    keys.bitwise_and_(-1 << bits).bitwise_or_(
        torch.arange(width, dtype=torch.int32, device=values.device)
    )
    found = []
    for _ in range(count):
        key = keys.amax(1, keepdim=True)
        column = key.bitwise_and_((1 << bits) - 1).long()
        found.append(column)
        keys.scatter_(1, column, lowest_of(keys.dtype))
    columns = torch.cat(found, 1)
    best = values.gather(1, columns)
    values.scatter_(1, columns, -torch.inf)
    return best, columns, values.amax(1)


def close_to_largest(values: Tensor, distance: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """All values of each row that are at most `distance` below its largest, `[M, N]`.

    Args:
        values: N is a multiple of `LANES`.
        distance: at least 0.
        most: rows with more such values have none returned.

    Returns:
        The largest of each row, `[M]`; then rows, ascending, and columns, `[P]` int64.
    """
    if values.numel() < _MANY_VALUES:
        best = values.amax(1)
        row, column = torch.where(values >= (best - distance).unsqueeze(1))
        return best, *_of_few(row, column, len(values), most)
    lanes = values.view(len(values), -1, LANES)
    maxima = lanes.amax(1)
    best = maxima.amax(1)
    threshold = best - distance
    row, lane = torch.where(maxima >= threshold.unsqueeze(1))
    row, lane = _of_few(row, lane, len(values), most)
    hit, step = torch.where(lanes[row, :, lane] >= threshold[row].unsqueeze(1))
    return best, *_of_few(row[hit], step * LANES + lane[hit], len(values), most)


def _of_few(row: Tensor, place: Tensor, rows: int, most: int) -> tuple[Tensor, Tensor]:
    """Without the rows that occur more than `most` times."""
    if len(row) <= most:
        return row, place
    fits = torch.bincount(row, minlength=rows)[row] <= most
    return row[fits], place[fits]


class Ranked(NamedTuple):
    """The two largest of each of M rows."""

    best: Tensor
    """`[M]`."""
    column: Tensor
    """`[M]` int64, where the best is."""
    second: Tensor
    """`[M]`."""
    maxima: Tensor
    """`[M, parts + rest]`: the largest of each part, then the columns that fill no part."""


def two_largest(values: Tensor) -> Ranked:
    """Rank the values of each row, `[M, N]`."""
    parts, rest = _parts(values)
    maxima = torch.cat((parts.amax(2), rest), 1)
    best, place, second = largest(maxima.clone(), 1)
    best, place = best[:, 0], place[:, 0]
    count = parts.shape[1]
    row = torch.where(place < count)[0]
    _, inside, runner_up = largest(parts[row, place[row]], 1)
    second[row] = torch.maximum(second[row], runner_up)
    column = place + (values.shape[1] - maxima.shape[1])
    column[row] = place[row] * PART_WIDTH + inside[:, 0]
    return Ranked(best, column, second, maxima)


def at_least(values: Tensor, ranked: Ranked, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of all values that reach their row's threshold, `[M, N], [M] -> [P], [P]`.

    Args:
        values: `[M, N]`.
        ranked: of `values`.
        threshold: `[M]`.
    """
    parts, _ = _parts(values)
    count = parts.shape[1]
    row, place = torch.where(ranked.maxima >= threshold.unsqueeze(1))
    is_part = place < count
    single_row = row[~is_part]
    single_column = place[~is_part] + (values.shape[1] - ranked.maxima.shape[1])
    row, place = row[is_part], place[is_part]
    hit, inside = torch.where(parts[row, place] >= threshold[row].unsqueeze(1))
    column = place[hit] * PART_WIDTH + inside
    return torch.cat((row[hit], single_row)), torch.cat((column, single_column))


def _parts(values: Tensor) -> tuple[Tensor, Tensor]:
    whole = values.shape[1] // PART_WIDTH * PART_WIDTH
    parts = values[:, :whole].view(len(values), whole // PART_WIDTH, PART_WIDTH)
    return parts, values[:, whole:]
