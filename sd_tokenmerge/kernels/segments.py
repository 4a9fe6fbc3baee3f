"""Sums of token features by label, in a fixed order on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.backend import runs_triton


class Segments:
    """The tokens of each image grouped by label, and sums over each group.

    Whatever depends only on the labels is computed on first use and kept, so labels that serve
    many denoising steps are sorted once.
    """

    def __init__(self, labels: Tensor, num_segments: int) -> None:
        """Group tokens by label.

        Args:
            labels: `[B, N]` int64 in `[0, K)`.
            num_segments: K.
        """
        self._labels = labels
        self._num_segments = num_segments
        self._rows: Tensor | None = None
        self._sizes: Tensor | None = None
        self._order: tuple[Tensor, Tensor] | None = None

    @property
    def longest(self) -> int:
        """N, the most tokens that a segment can have."""
        return self._labels.shape[1]

    @property
    def total(self) -> int:
        """B * K, the number of segments in all images."""
        return self._labels.shape[0] * self._num_segments

    @property
    def rows(self) -> Tensor:
        """Each token's row in a `[B * K, C]` table of segments, `[B * N]` int64."""
        if self._rows is None:
            batch = self._labels.shape[0]
            first = torch.arange(batch, device=self._labels.device) * self._num_segments
            self._rows = (self._labels + first.unsqueeze(1)).flatten()
        return self._rows

    @property
    def sizes(self) -> Tensor:
        """Tokens per segment, `[B, K]` int64."""
        if self._sizes is None:
            zeros = self._labels.new_zeros(self._labels.shape[0], self._num_segments)
            # integer sums do not depend on their order
            self._sizes = zeros.scatter_add_(1, self._labels, torch.ones_like(self._labels))
        return self._sizes

    @property
    def order(self) -> tuple[Tensor, Tensor]:
        """All tokens sorted by segment, `[B * N]`, and where each segment begins, `[B * K + 1]`."""
        if self._order is None:
            self._order = sort_by_label(self.rows, self.total)
        return self._order

    def sum(self, tokens: Tensor) -> Tensor:
        """Sum the tokens of each segment, `[B, N, C] -> [B, K, C]`.

        The order of each sum is fixed, so results repeat exactly on one device; they differ between
        devices by rounding. Nothing waits for the device.

        Args:
            tokens: `[B, N, C]`, any float dtype.

        Returns:
            `[B, K, C]` in float32, or float64 for float64 tokens; zero for an unused label.
            Gradients flow to `tokens`.
        """
        batch, _, channels = tokens.shape
        sums = _flat_sum(tokens.reshape(-1, channels), self)
        return sums.view(batch, self._num_segments, channels)


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
    if not tokens.is_cuda:
        return _sum_by_scan(tokens, segments)
    needs_gradient = torch.is_grad_enabled() and tokens.requires_grad
    if runs_triton(tokens) and not needs_gradient and not torch.compiler.is_compiling():
        from sd_tokenmerge.kernels.triton_segments import sum_sorted_segments

        return sum_sorted_segments(tokens, *segments.order, _sum_dtype(tokens))
    return _sum_sorted(tokens, segments)


def _sum_in_token_order(tokens: Tensor, segments: Segments) -> Tensor:
    """Add one token after the other; on CUDA the order of `index_add_` would vary."""
    zeros = tokens.new_zeros(segments.total, tokens.shape[1], dtype=_sum_dtype(tokens))
    return zeros.index_add_(0, segments.rows, tokens.to(zeros.dtype))


def _sum_sorted(tokens: Tensor, segments: Segments) -> Tensor:
    order, first = segments.order
    return torch.segment_reduce(
        tokens.to(_sum_dtype(tokens))[order], "sum", lengths=first.diff(), unsafe=True, initial=0
    )


def _sum_by_scan(tokens: Tensor, segments: Segments) -> Tensor:
    """Sum by a segmented scan, from operations that every backend has, MPS included.

    After the step of reach r, a token holds the sum of the last 2r tokens of its segment up to
    itself (Hillis and Steele, 1986). Sums of one segment never contain another's tokens, so unlike
    differences of a cumulative sum they lose no digits: the error is at most log2(N) roundings.
    """
    order, first = segments.order
    labels = segments.rows.index_select(0, order)
    sums = tokens.to(_sum_dtype(tokens)).index_select(0, order)
    reach = 1
    while reach < segments.longest:
        continues = (labels[reach:] == labels[:-reach]).unsqueeze(1)
        carried = torch.where(continues, sums[:-reach], 0)
        sums = torch.cat((sums[:reach], sums[reach:] + carried))
        reach *= 2
    last = first[1:] - 1
    used = (first.diff() > 0).unsqueeze(1)
    return torch.where(used, sums.index_select(0, last.clamp(min=0)), 0)


def sort_by_label(labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Sort tokens by segment, keeping their order within each.

    Args:
        labels: `[N]` int64 in `[0, total)`.
        total: number of segments.

    Returns:
        The sorted tokens' indices, `[N]`, and the place where each segment begins, with N as the
        last entry, `[total + 1]`; both int64.
    """
    ordered, order = labels.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(total + 1, device=labels.device))


def _sum_dtype(tokens: Tensor) -> torch.dtype:
    return torch.float64 if tokens.dtype == torch.float64 else torch.float32
