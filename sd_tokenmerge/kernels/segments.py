"""Sums of token features by label, in a fixed order on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.backend import runs_triton


def segment_sum(tokens: Tensor, labels: Tensor, num_segments: int) -> Tensor:
    """Sum the tokens of each segment, `[B, N, C] -> [B, K, C]`.

    Args:
        tokens: `[B, N, C]`, any float dtype.
        labels: `[B, N]` int64 in `[0, K)`.
        num_segments: K; an unused label sums to zero.

    Returns:
        `[B, K, C]`, float32, or float64 where `tokens` are float64. Each sum is taken in token
        order on the CPU and by Triton, and segment by segment on other devices, where `index_add_`
        would use atomics in an order that changes from run to run. Gradients flow to `tokens`,
        except through Triton, which is not used where `tokens` require them.
    """
    batch, _, channels = tokens.shape
    rows = torch.arange(batch, device=labels.device).unsqueeze(1) * num_segments
    flat_labels = (labels + rows).reshape(-1)
    flat_tokens = tokens.reshape(-1, channels)
    sums = _flat_sum(flat_tokens, flat_labels, batch * num_segments)
    return sums.view(batch, num_segments, channels)


def _flat_sum(tokens: Tensor, labels: Tensor, total: int) -> Tensor:
    needs_gradient = torch.is_grad_enabled() and tokens.requires_grad
    if runs_triton(tokens) and not needs_gradient and not torch.compiler.is_compiling():
        from sd_tokenmerge.kernels.triton_segments import segment_sum_flat

        return segment_sum_flat(tokens, labels, total)
    tokens = tokens.to(torch.float64 if tokens.dtype == torch.float64 else torch.float32)
    if tokens.device.type == "cpu":
        return tokens.new_zeros(total, tokens.shape[1]).index_add_(0, labels, tokens)
    order = torch.argsort(labels, stable=True)
    lengths = torch.zeros(total, dtype=torch.int64, device=labels.device)
    lengths.scatter_add_(0, labels, torch.ones_like(labels))  # unlike bincount, without waiting
    return torch.segment_reduce(tokens[order], "sum", lengths=lengths, unsafe=True, initial=0)
