"""Lists of nearest neighbours, with an error bound that is never exceeded.

A search by products is only ever used as a filter: it returns short lists of candidates and, for
everything not listed, an upper bound that includes the rounding errors. Where a decision is closer
than the errors, the caller computes exact similarities (`sd_tokenmerge.kernels.exact`). So the
dtype of a product decides about speed, never about the result.

The searches: `sd_tokenmerge.kernels.nearest` within one image, `images` within several small ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sd_tokenmerge.kernels.ranking import largest, largest_similarities

LIST_LENGTH = 4


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


def join_lists(parts: list[Lists]) -> Lists:
    """Lists of more rows, in the order given."""
    return Lists(*(torch.cat(field) for field in zip(*parts, strict=True)))


def list_largest(values: Tensor, error: float) -> Lists:
    """The lists of rows whose similarities to all columns are given, `[M, N]`; overwritten."""
    value, column, rest = largest_similarities(values, LIST_LENGTH)
    return Lists(column, value, rest.double() + error)


def union(one: Lists, other: Lists, channels: int) -> Lists:
    """Lists of the same rows over two disjoint sets of columns, as one."""
    column = torch.cat((one.column, other.column), 1)
    value, place, rest = largest(torch.cat((one.value, other.value), 1), LIST_LENGTH)
    rest = rest.double() + float32_error(channels)
    bound = torch.maximum(rest, torch.maximum(one.bound, other.bound))
    return Lists(column.gather(1, place), value, bound)


def blocks(size: int, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of equal length, so many rows at once."""
    return zip(*(torch.split(part, size) for part in values), strict=True)
