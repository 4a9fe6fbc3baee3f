"""Sums of tokens sorted by segment, as a Triton kernel."""

# ruff: noqa: N803  (Triton constants are upper case)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_CHANNELS = 128


@triton.jit
def sum_segments(tokens, order, first, sums, C, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum one segment's tokens in order; one program per segment and block of channels."""
    segment = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), DTYPE)
    for place in range(tl.load(first + segment), tl.load(first + segment + 1)):
        token = tl.load(order + place)
        total += tl.load(tokens + token * C + channel, channel < C, 0.0).to(DTYPE)
    tl.store(sums + segment * C + channel, total, channel < C)


def sum_sorted_segments(tokens: Tensor, order: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the tokens of each segment in order, `[N, C] -> [K, C]` in `dtype`.

    Args:
        tokens: `[N, C]`, any float dtype, on CUDA.
        order: `[N]` int64, the tokens' indices sorted by segment.
        first: `[K + 1]` int64, the place in `order` where each segment begins; the last is N.
        dtype: float32 or float64.
    """
    num_segments, channels = len(first) - 1, tokens.shape[1]
    sums = tokens.new_empty(num_segments, channels, dtype=dtype)
    sum_segments[(num_segments, triton.cdiv(channels, _BLOCK_CHANNELS))](
        tokens.contiguous(),
        order,
        first,
        sums,
        channels,
        DTYPE=tl.float64 if dtype == torch.float64 else tl.float32,
        BLOCK_C=_BLOCK_CHANNELS,
        enable_fp_fusion=False,
    )
    return sums
