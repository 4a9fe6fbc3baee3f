"""Triton kernel of `sd_tokenmerge.kernels.segments`."""

# ruff: noqa: N803  (Triton's constants are in capitals)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_CHANNELS = 128


@triton.jit
def sum_segments(tokens, order, first, sums, C, DTYPE: tl.constexpr, BLOCK_C: tl.constexpr):
    """Add up the tokens of one segment, one after the other; one program per segment and block."""
    segment = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C,), DTYPE)
    for place in range(tl.load(first + segment), tl.load(first + segment + 1)):
        token = tl.load(order + place)
        total += tl.load(tokens + token * C + channel, channel < C, 0.0).to(DTYPE)
    tl.store(sums + segment * C + channel, total, channel < C)


def sum_sorted_segments(tokens: Tensor, order: Tensor, first: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum the tokens of each segment in their order, `[N, C] -> [K, C]` in `dtype`.

    Args:
        tokens: `[N, C]`.
        order: `[N]` int64, tokens by segment.
        first: `[K + 1]` int64, where each segment begins in `order`.
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
