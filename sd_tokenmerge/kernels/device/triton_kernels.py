"""Triton kernels of average linkage, for `sd_tokenmerge.kernels.device.triton_average`.

All arrays are those of `TritonAverageRounds`, `[B, N]` or `[B, N, C]`, contiguous, and flags are
int8; program axis 1 is the image. A program that has nothing to do returns at once, so the grids
never depend on the data.

Precision: the search is a filter like that of `sd_tokenmerge.kernels.search`; what decides is
computed as in `sd_tokenmerge.kernels.exact`: products of fixed-point parts, whose sums are exact in
any order.
"""

# ruff: noqa: N803  (Triton's constants are in capitals)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
from __future__ import annotations

import triton
import triton.language as tl

_FARTHEST = tl.constexpr(2**62)


@triton.jit
def _high_part(x):
    """|x| <= 1 to a multiple of 2^-26: adding 1.5 * 2^26 leaves 26 bits after the point."""
    return (x + 100663296.0) - 100663296.0


@triton.jit
def _low_part(x, high, LOW_MAGIC: tl.constexpr):
    """The rest, to a multiple of 2^-low_bits; LOW_MAGIC is 1.5 * 2^(52 - low_bits)."""
    return ((x - high) + LOW_MAGIC) - LOW_MAGIC


@triton.jit(do_not_specialize=["this_round"])  # else rounds 1 and 16 compile their own
def merge_pairs(
    nearest,
    total,
    size,
    mean,
    rest,
    alive,
    is_new,
    parent,
    height,
    own_height,
    merged_in,
    bound,
    this_round,
    N,
    C,
    LOW_MAGIC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Merge each cluster with its nearest where that is mutual and at most `bound` away.

    One program per cluster; the lower one of a pair does the work. A pair that is too far is taken
    out of play: each becomes its own nearest.
    """
    cluster = tl.program_id(0).to(tl.int64)
    base = tl.program_id(1).to(tl.int64) * N
    other = tl.load(nearest + base + cluster)
    back = tl.load(nearest + base + other)
    if (back != cluster) | (cluster >= other):
        return
    left, right = base + cluster, base + other
    left_size, right_size = tl.load(size + left), tl.load(size + right)
    channel = tl.arange(0, BLOCK_C)
    high_sum = tl.zeros((BLOCK_C,), tl.float64)
    cross_sum = tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, C, BLOCK_C):
        inside = start + channel < C
        x = tl.load(total + left * C + start + channel, inside, 0.0) / left_size
        y = tl.load(total + right * C + start + channel, inside, 0.0) / right_size
        x_high, y_high = _high_part(x), _high_part(y)
        x_low, y_low = _low_part(x, x_high, LOW_MAGIC), _low_part(y, y_high, LOW_MAGIC)
        high_sum += x_high * y_high
        cross_sum += x_high * y_low + x_low * y_high
    similarity = tl.sum(high_sum, 0) + tl.sum(cross_sum, 0)
    merged_height = tl.maximum(tl.load(own_height + left), tl.load(own_height + right))
    merged_height = tl.maximum(1.0 - similarity, merged_height)
    if merged_height > tl.load(bound + tl.program_id(1)):
        tl.store(nearest + left, cluster)
        tl.store(nearest + right, other)
        return
    merged_size = left_size + right_size
    for start in range(0, C, BLOCK_C):
        inside = start + channel < C
        x = tl.load(total + left * C + start + channel, inside, 0.0)
        y = tl.load(total + right * C + start + channel, inside, 0.0)
        tl.store(total + left * C + start + channel, x + y, inside)
        tl.store(mean + left * C + start + channel, ((x + y) / merged_size).to(tl.float32), inside)
    both_rest = tl.load(rest + left) * left_size + tl.load(rest + right) * right_size
    tl.store(rest + left, both_rest / merged_size)
    tl.store(size + left, merged_size)
    tl.store(own_height + left, merged_height)
    tl.store(is_new + left, 1)
    tl.store(nearest + right, other)
    tl.store(alive + right, 0)
    tl.store(parent + right, cluster)
    tl.store(height + right, merged_height)
    tl.store(merged_in + right, this_round)


@triton.jit
def refresh(
    nearest,
    mean,
    rest,
    alive,
    is_new,
    parent,
    dormant,
    search,
    bound,
    error,
    N,
    C,
    BLOCK_C: tl.constexpr,
):
    """Decide which clusters must be searched for, after a round of merges; one program each.

    A cluster whose nearest was merged keeps the result as its nearest if that is still more similar
    than all others can be. A cluster that nothing within `bound` can reach becomes dormant.
    """
    cluster = tl.program_id(0).to(tl.int64)
    base = tl.program_id(1).to(tl.int64) * N
    tl.store(search + base + cluster, 0)
    if tl.load(alive + base + cluster) == 0:
        return
    former = tl.load(nearest + base + cluster)
    target = tl.where(tl.load(alive + base + former) != 0, former, tl.load(parent + base + former))
    fresh = tl.load(is_new + base + cluster) != 0
    if (fresh == 0) & (tl.load(is_new + base + target) == 0):
        return
    channel = tl.arange(0, BLOCK_C)
    product = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, C, BLOCK_C):
        inside = start + channel < C
        x = tl.load(mean + (base + cluster) * C + start + channel, inside, 0.0)
        y = tl.load(mean + (base + target) * C + start + channel, inside, 0.0)
        product += x * y
    similarity = tl.where(fresh, -float("inf"), tl.sum(product, 0)).to(tl.float64)
    others = tl.load(rest + base + cluster) + error
    if tl.maximum(similarity + error, others) < 1.0 - tl.load(bound + tl.program_id(1)):
        tl.store(nearest + base + cluster, cluster)
        tl.store(dormant + base + cluster, 1)
    elif similarity - error > others:
        tl.store(nearest + base + cluster, target)
    else:
        tl.store(search + base + cluster, 1)


@triton.jit
def find_nearest(
    mean,
    rows,
    row_count,
    columns,
    column_count,
    nearest,
    best,
    rest,
    dormant,
    bound,
    error,
    N,
    C,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Product of the listed rows with the listed columns, reduced to the two largest on the way."""
    image = tl.program_id(1)
    base = image.to(tl.int64) * N
    count = tl.load(row_count + image)
    start_row = tl.program_id(0) * BLOCK_M
    if start_row >= count:
        return
    place = start_row + tl.arange(0, BLOCK_M)
    row = tl.load(rows + base + place, place < count, 0)
    largest = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    second = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    found = row
    channel = tl.arange(0, BLOCK_C)
    number = tl.arange(0, BLOCK_N)
    for start_column in range(0, tl.load(column_count + image), BLOCK_N):
        valid = start_column + number < tl.load(column_count + image)
        column = tl.load(columns + base + start_column + number, valid, 0)
        product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, C, BLOCK_C):
            inside = (start + channel < C)[None, :]
            x = tl.load(mean + (base + row)[:, None] * C + start + channel[None, :], inside, 0.0)
            y = tl.load(mean + (base + column)[:, None] * C + start + channel[None, :], inside, 0.0)
            product = tl.dot(x, tl.trans(y), product, input_precision=PRECISION)
        apart = valid[None, :] & (row[:, None] != column[None, :])
        product = tl.where(apart, product, -float("inf"))
        value, position = tl.max(product, 1, return_indices=True)
        is_it = number[None, :] == position[:, None]
        candidate = tl.sum(tl.where(is_it, column[None, :], 0), 1)
        runner_up = tl.max(tl.where(is_it, -float("inf"), product), 1)
        second = tl.maximum(tl.minimum(largest, value), tl.maximum(second, runner_up))
        found = tl.where(value > largest, candidate, found)
        largest = tl.maximum(largest, value)
    floor = 1.0 - tl.load(bound + image)
    hopeless = (largest.to(tl.float64) + error < floor) | (largest == -float("inf"))
    tl.store(nearest + base + row, tl.where(hopeless, row, found), place < count)
    tl.store(dormant + base + row, hopeless.to(tl.int8), place < count)
    tl.store(best + base + row, largest.to(tl.float64), place < count)
    tl.store(rest + base + row, second.to(tl.float64), place < count)


@triton.jit
def resolve(
    total,
    size,
    mean,
    rows,
    row_count,
    columns,
    column_count,
    nearest,
    best,
    rest,
    error,
    N,
    C,
    LOW_MAGIC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Where the two largest are closer than the error: exact similarities, ties by XOR.

    One program per searched row. Only blocks of columns with a value near the largest are computed
    exactly.
    """
    image = tl.program_id(1)
    base = image.to(tl.int64) * N
    if tl.program_id(0) >= tl.load(row_count + image):
        return
    row = tl.load(rows + base + tl.program_id(0))
    largest = tl.load(best + base + row)
    proven = largest - error > tl.load(rest + base + row) + error
    if proven | (tl.load(nearest + base + row) == row):
        return
    row_size = tl.load(size + base + row)
    channel = tl.arange(0, BLOCK_C)
    number = tl.arange(0, BLOCK_N)
    top = tl.full((BLOCK_N,), -float("inf"), tl.float64)
    top_distance = tl.full((BLOCK_N,), _FARTHEST, tl.int64)
    for start_column in range(0, tl.load(column_count + image), BLOCK_N):
        valid = start_column + number < tl.load(column_count + image)
        column = tl.load(columns + base + start_column + number, valid, 0)
        product = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, C, BLOCK_C):
            inside = start + channel < C
            x = tl.load(mean + (base + row) * C + start + channel, inside, 0.0)
            y = tl.load(
                mean + (base + column)[:, None] * C + start + channel[None, :],
                inside[None, :],
                0.0,
            )
            product += tl.sum(x[None, :] * y, 1)
        near = valid & (column != row) & (product.to(tl.float64) >= largest - 2 * error)
        if tl.max(near.to(tl.int32), 0) > 0:
            high_sum = tl.zeros((BLOCK_N,), tl.float64)
            cross_sum = tl.zeros((BLOCK_N,), tl.float64)
            column_size = tl.load(size + base + column)
            for start in range(0, C, BLOCK_C):
                inside = start + channel < C
                x64 = tl.load(total + (base + row) * C + start + channel, inside, 0.0) / row_size
                y64 = tl.load(
                    total + (base + column)[:, None] * C + start + channel[None, :],
                    inside[None, :],
                    0.0,
                )
                y64 = y64 / column_size[:, None]
                x_high, y_high = _high_part(x64), _high_part(y64)
                x_low = _low_part(x64, x_high, LOW_MAGIC)
                y_low = _low_part(y64, y_high, LOW_MAGIC)
                high_sum += tl.sum(x_high[None, :] * y_high, 1)
                cross_sum += tl.sum(x_high[None, :] * y_low + x_low[None, :] * y_high, 1)
            similarity = tl.where(near, high_sum + cross_sum, -float("inf"))
            distance = row ^ column
            better = (similarity > top) | ((similarity == top) & (distance < top_distance))
            top = tl.where(better & near, similarity, top)
            top_distance = tl.where(better & near, distance, top_distance)
    winners = tl.where(top == tl.max(top, 0), top_distance, _FARTHEST)
    tl.store(nearest + base + row, row ^ tl.min(winners, 0))
