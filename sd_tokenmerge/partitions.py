"""The one type every merging method produces: which cluster each token is in.

This is the only module that scatters or gathers token features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_tokenmerge.kernels.segments import Segments


def clusters_to_keep(num_tokens: int, keep_rate: float) -> int:
    """Number of clusters K that a keep rate leaves: `N - floor(N * (1 - keep_rate))`.

    What lies within 10^-6 of a whole number of tokens counts as whole: 0.9 of 10 tokens is 9,
    although `10 * (1 - 0.9)` is 0.9999999999999998 in binary.

    Args:
        num_tokens: N, at least 1.
        keep_rate: fraction of the tokens that is kept, in (0, 1].

    Returns:
        K, in [1, N].

    Raises:
        ValueError: `num_tokens` is below 1, or `keep_rate` is outside (0, 1].
    """
    if num_tokens < 1:
        raise ValueError(f"`num_tokens` must be at least 1, got {num_tokens}.")
    if not 0 < keep_rate <= 1:
        raise ValueError(f"`keep_rate` must be in (0, 1], got {keep_rate}.")
    removed = math.floor(num_tokens * (1 - keep_rate) + 1e-6)
    return max(num_tokens - removed, 1)


@dataclass(frozen=True, eq=False)
class Partition:
    """A disjoint cover of N tokens by K clusters, for each image of a batch.

    Attributes:
        labels: `[B, N]` int64; the cluster of each token. Every label in `[0, K)` must be used in
            every row: an empty cluster has no mean (0/0). `Partition.check` verifies this; methods
            guarantee it.
        num_clusters: K.
        representatives: `[B, K]` int64 token indices, or None. Where given (K-Medoids), a cluster
            is represented by that token instead of by its mean.
    """

    labels: Tensor
    num_clusters: int
    representatives: Tensor | None = None
    _segments: Segments = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_segments", Segments(self.labels, self.num_clusters))

    @property
    def sizes(self) -> Tensor:
        """Tokens per cluster, `[B, K]` int64."""
        return self._segments.sizes

    def merge(self, tokens: Tensor) -> Tensor:
        """Represent each cluster by one token, `[B, N, C] -> [B, K, C]`.

        The mean of the cluster's tokens (LoTM eq. 10), summed in float32 (float64 for float64
        input) in a fixed order on every device, or the representative token where the method
        chose one.

        Raises:
            ValueError: `tokens` is not `[B, N, C]` with the B and N of `labels`.
        """
        self._require(tokens, self.labels.shape[1], "tokens")
        if self.representatives is not None:
            index = self.representatives.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            return tokens.gather(1, index)
        return (self._segments.sum(tokens) / self.sizes.unsqueeze(-1)).to(tokens.dtype)

    def unmerge(self, merged: Tensor) -> Tensor:
        """Give every token its cluster's features, `[B, K, C] -> [B, N, C]`.

        Raises:
            ValueError: `merged` is not `[B, K, C]` with the B of `labels`.
        """
        self._require(merged, self.num_clusters, "merged")
        # whole rows of a flat table: on the CPU a tenth of the time of a gather per element
        tokens = merged.flatten(0, 1).index_select(0, self._segments.rows)
        return tokens.view(*self.labels.shape, merged.shape[-1])

    def check(self) -> Partition:
        """Verify the invariants that methods guarantee; returns self.

        Waits for the device, so it belongs into tests and the public door, not into a denoising
        loop.

        Raises:
            ValueError: `labels` is not a non-empty int64 `[B, N]`, a label is outside `[0, K)` or
                unused, or the representatives are not one member of each cluster.
        """
        if self.labels.ndim != 2 or self.labels.numel() == 0:
            raise ValueError(f"`labels` must be a non-empty [B, N], got {list(self.labels.shape)}.")
        if self.labels.dtype != torch.int64:
            raise ValueError(f"`labels` must be int64, got {self.labels.dtype}.")
        self._require_range(self.labels, self.num_clusters, "labels")
        unused = int((self.sizes == 0).sum())
        if unused:
            raise ValueError(
                f"`labels` must use every label in [0, {self.num_clusters}), got {unused} unused."
            )
        if self.representatives is not None:
            self._check_representatives(self.representatives)
        return self

    def _check_representatives(self, representatives: Tensor) -> None:
        batch, num_tokens = self.labels.shape
        expected = [batch, self.num_clusters]
        if list(representatives.shape) != expected:
            raise ValueError(
                f"`representatives` must be {expected}, got {list(representatives.shape)}."
            )
        self._require_range(representatives, num_tokens, "representatives")
        clusters = torch.arange(self.num_clusters, device=self.labels.device)
        if not (self.labels.gather(1, representatives) == clusters).all():
            raise ValueError("`representatives` must be members of their own clusters.")

    def _require_range(self, values: Tensor, end: int, name: str) -> None:
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= end:
            raise ValueError(f"`{name}` must be in [0, {end}), got values from {low} to {high}.")

    def _require(self, tensor: Tensor, length: int, name: str) -> None:
        expected = (self.labels.shape[0], length)
        if tensor.ndim != 3 or tuple(tensor.shape[:2]) != expected:
            raise ValueError(
                f"`{name}` must be [{expected[0]}, {expected[1]}, C], got {list(tensor.shape)}."
            )
