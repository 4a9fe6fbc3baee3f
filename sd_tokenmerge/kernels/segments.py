"""Sums of token features by label, in a fixed order on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.backend import runs_triton


class Segments:
    """The tokens of each image, by label; sums of whatever features they have.

    What depends on the labels alone is worked out when it is first needed, and kept: for labels
    that are used in many steps, it is done once.

    Attributes:
        total: segments of all images together, B * K.
    """

    def __init__(self, labels: Tensor, num_segments: int) -> None:
        """Segments of images.

        Args:
            labels: `[B, N]` int64 in `[0, K)`.
            num_segments: K.
        """
        self._labels = labels
        self._num_segments = num_segments
        self.total = labels.shape[0] * num_segments
        self._rows: Tensor | None = None
        self._sizes: Tensor | None = None
        self._order: tuple[Tensor, Tensor] | None = None

    @property
    def rows(self) -> Tensor:
        """The row of each token's segment in a table of all images' segments, `[B * N]` int64."""
        if self._rows is None:
            batch = self._labels.shape[0]
            first = torch.arange(batch, device=self._labels.device) * self._num_segments
            self._rows = (self._labels + first.unsqueeze(1)).flatten()
        return self._rows

    @property
    def sizes(self) -> Tensor:
        """Tokens of each segment, `[B, K]` int64."""
        if self._sizes is None:
            zeros = self._labels.new_zeros(self._labels.shape[0], self._num_segments)
            # integer sums do not depend on their order
            self._sizes = zeros.scatter_add_(1, self._labels, torch.ones_like(self._labels))
        return self._sizes

    @property
    def order(self) -> tuple[Tensor, Tensor]:
        """All images' tokens, `[B * N]`, by segment, and where each begins, `[B * K + 1]`."""
        if self._order is None:
            self._order = sort_by_label(self.rows, self.total)
        return self._order

    def sum(self, tokens: Tensor) -> Tensor:
        """Sum the tokens of each segment, `[B, N, C] -> [B, K, C]`.

        The same numbers on every run: each sum is taken in token order, on the CPU by `index_add_`,
        which goes through the tokens one after the other, elsewhere over tokens sorted by label. On
        CUDA, `index_add_` would add by atomics, in an order that changes from run to run. Nothing
        waits for the device.

        Args:
            tokens: `[B, N, C]`, any float dtype.

        Returns:
            `[B, K, C]`, float32, or float64 where `tokens` are float64; an unused label sums to
            zero. Gradients flow to `tokens`.
        """
        batch, _, channels = tokens.shape
        return _flat_sum(tokens.reshape(-1, channels), self).view(
            batch, self._num_segments, channels
        )


def segment_sum(tokens: Tensor, labels: Tensor, num_segments: int) -> Tensor:
    """Sum the tokens of each segment, `[B, N, C] -> [B, K, C]`, by `Segments.sum`.

    Args:
        tokens: `[B, N, C]`, any float dtype.
        labels: `[B, N]` int64 in `[0, K)`.
        num_segments: K.
    """
    return Segments(labels, num_segments).sum(tokens)


def _flat_sum(tokens: Tensor, segments: Segments) -> Tensor:
    if tokens.device.type == "cpu":
        return _sum_in_token_order(tokens, segments)
    needs_gradient = torch.is_grad_enabled() and tokens.requires_grad
    if runs_triton(tokens) and not needs_gradient and not torch.compiler.is_compiling():
        from sd_tokenmerge.kernels.triton_segments import sum_sorted_segments

        return sum_sorted_segments(tokens, *segments.order, _sum_dtype(tokens))
    return _sorted_sum(tokens, segments)


def _sum_in_token_order(tokens: Tensor, segments: Segments) -> Tensor:
    zeros = tokens.new_zeros(segments.total, tokens.shape[1], dtype=_sum_dtype(tokens))
    return zeros.index_add_(0, segments.rows, tokens.to(zeros.dtype))


def _sorted_sum(tokens: Tensor, segments: Segments) -> Tensor:
    order, first = segments.order
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
