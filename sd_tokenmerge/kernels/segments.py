"""Sums of token features by label, in a fixed order on every device."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sum(tokens: Tensor, labels: Tensor, num_segments: int) -> Tensor:
    """Sum the tokens of each segment, `[B, N, C] -> [B, K, C]`.

    Args:
        tokens: `[B, N, C]`, any float dtype.
        labels: `[B, N]` int64 in `[0, K)`.
        num_segments: K; an unused label sums to zero.

    Returns:
        `[B, K, C]`, float32, or float64 where `tokens` are float64. Each sum is taken in token
        order on the CPU and segment by segment on CUDA, where `index_add_` would use atomics in an
        order that changes from run to run.
    """
    batch, _, channels = tokens.shape
    dtype = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    rows = torch.arange(batch, device=labels.device).unsqueeze(1) * num_segments
    flat_labels = (labels + rows).reshape(-1)
    flat_tokens = tokens.reshape(-1, channels).to(dtype)
    total = batch * num_segments
    if tokens.device.type == "cpu":
        sums = torch.zeros(total, channels, dtype=dtype).index_add_(0, flat_labels, flat_tokens)
    else:
        order = torch.argsort(flat_labels, stable=True)
        lengths = torch.bincount(flat_labels, minlength=total)
        sums = torch.segment_reduce(
            flat_tokens[order], "sum", lengths=lengths, unsafe=True, initial=0
        )
    return sums.view(batch, num_segments, channels)
