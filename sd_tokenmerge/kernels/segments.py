"""Sums of token features by label, in a fixed order on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.backend import runs_triton


def segment_sum(tokens: Tensor, labels: Tensor, num_segments: int) -> Tensor:
    """Sum the tokens of each segment, `[B, N, C] -> [B, K, C]`.

    The same numbers on every run: each sum is taken in token order, on the CPU by `index_add_`,
    which goes through the tokens one after the other, elsewhere over tokens sorted by label. On
    CUDA, `index_add_` would add by atomics, in an order that changes from run to run. Nothing waits
    for the device.

    Args:
        tokens: `[B, N, C]`, any float dtype.
        labels: `[B, N]` int64 in `[0, K)`.
        num_segments: K; an unused label sums to zero.

    Returns:
        `[B, K, C]`, float32, or float64 where `tokens` are float64. Gradients flow to `tokens`.
    """
    batch, _, channels = tokens.shape
    rows = torch.arange(batch, device=labels.device).unsqueeze(1) * num_segments
    flat_labels = (labels + rows).reshape(-1)
    flat_tokens = tokens.reshape(-1, channels)
    sums = _flat_sum(flat_tokens, flat_labels, batch * num_segments)
    return sums.view(batch, num_segments, channels)


def _flat_sum(tokens: Tensor, labels: Tensor, total: int) -> Tensor:
    if tokens.device.type == "cpu":
        tokens = tokens.to(_sum_dtype(tokens))
        return tokens.new_zeros(total, tokens.shape[1]).index_add_(0, labels, tokens)
    needs_gradient = torch.is_grad_enabled() and tokens.requires_grad
    if runs_triton(tokens) and not needs_gradient and not torch.compiler.is_compiling():
        from sd_tokenmerge.kernels.triton_segments import sum_sorted_segments

        return sum_sorted_segments(tokens, *sort_by_label(labels, total), _sum_dtype(tokens))
    return _sorted_sum(tokens, labels, total)


def _sorted_sum(tokens: Tensor, labels: Tensor, total: int) -> Tensor:
    order, first = sort_by_label(labels, total)
    return torch.segment_reduce(
        tokens.to(_sum_dtype(tokens))[order], "sum", lengths=first.diff(), unsafe=True, initial=0
    )


def sort_by_label(labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """The tokens of each segment in their order, and where each segment begins.

    Args:
        labels: `[N]` int64 in `[0, total)`.
        total: number of segments.

    Returns:
        `[N]` and `[total + 1]` int64.
    """
    ordered, order = labels.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(total + 1, device=labels.device))


def _sum_dtype(tokens: Tensor) -> torch.dtype:
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32
