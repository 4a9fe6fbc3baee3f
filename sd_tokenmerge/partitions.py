"""The result of every merging method: which cluster each token is in.

Merging and unmerging of token features happen only here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd_tokenmerge.kernels.segments import Segments


def clusters_to_keep(num_tokens: int, keep_rate: float) -> int:
    """Number of clusters K for a keep rate: `N - floor(N * (1 - keep_rate))`, at least 1.

    Results within 10^-6 of a whole number of tokens count as whole: 0.9 of 10 tokens is 9, although
    `10 * (1 - 0.9)` is 0.9999999999999998 in binary.

    Args:
        num_tokens: N, at least 1.
        keep_rate: fraction of the tokens to keep, in (0, 1].

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
    """A division of N tokens into K disjoint clusters, for each image of a batch.

    Labels on a CPU are checked when the partition is created. On other devices only their form is,
    as looking at values would wait for the device; `check` does so.

    Attributes:
        labels: `[B, N]` int64; the cluster of each token. Every row uses every label in `[0, K)`,
            as an empty cluster has no mean.
        num_clusters: K, in [1, N].
        representatives: `[B, K]` int64 token indices, or None. If given (K-Medoids), each cluster
            is represented by that token instead of by its mean.

    Raises:
        TypeError: `labels` or `representatives` are not tensors.
        ValueError: they have the wrong form or, on a CPU, fail `check`.
    """

    labels: Tensor
    num_clusters: int
    representatives: Tensor | None = None
    _segments: Segments = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_form()
        object.__setattr__(self, "_segments", Segments(self.labels, self.num_clusters))
        if self.labels.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check()

    @property
    def sizes(self) -> Tensor:
        """Tokens per cluster, `[B, K]` int64."""
        return self._segments.sizes

    def log_sizes(self, dtype: torch.dtype) -> Tensor:
        """Logarithm of `sizes`, `[B, K]`, computed in at least float32."""
        return self.sizes.to(torch.promote_types(dtype, torch.float32)).log().to(dtype)

    def merge(self, tokens: Tensor) -> Tensor:
        """Represent each cluster by one token, `[B, N, C] -> [B, K, C]`.

        That is the representative if there is one, otherwise the mean of the cluster's tokens (LoTM
        eq. 10), summed in float32 (float64 for float64 tokens) in a fixed order on every device.

        Raises:
            ValueError: `tokens` are not `[B, N, C]` with the B and N of `labels`.
        """
        self._require_length(tokens, self.labels.shape[1], "tokens")
        if self.representatives is not None:
            index = self.representatives.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
            return tokens.gather(1, index)
        return (self._segments.sum(tokens) / self.sizes.unsqueeze(-1)).to(tokens.dtype)

    def unmerge(self, merged: Tensor) -> Tensor:
        """Give every token its cluster's features, `[B, K, C] -> [B, N, C]`.

        Raises:
            ValueError: `merged` is not `[B, K, C]` with the B of `labels`.
        """
        self._require_length(merged, self.num_clusters, "merged")
        # whole rows of a flat table: on the CPU a tenth of the time of a gather per element
        tokens = merged.flatten(0, 1).index_select(0, self._segments.rows)
        return tokens.view(*self.labels.shape, merged.shape[-1])

    def with_singletons(self, before: int, after: int) -> Partition:
        """This partition with further tokens before and after its own, each a cluster by itself.

        The new clusters come after the K of this partition.
        """
        if before == after == 0:
            return self
        batch, num_tokens = self.labels.shape
        total = before + num_tokens + after
        new = torch.arange(self.num_clusters, self.num_clusters + before + after)
        new = new.to(self.labels.device).expand(batch, -1)
        labels = torch.cat((new[:, :before], self.labels, new[:, before:]), 1)
        representatives = None
        if self.representatives is not None:
            places = torch.arange(total, device=self.labels.device).expand(batch, -1)
            alone = torch.cat((places[:, :before], places[:, before + num_tokens :]), 1)
            representatives = torch.cat((self.representatives + before, alone), 1)
        return Partition(labels, self.num_clusters + before + after, representatives)

    def check(self) -> Partition:
        """Check the values of labels and representatives, waiting for the device; returns self.

        Raises:
            ValueError: a label is outside `[0, K)` or unused, or the representatives are not one
                member of each cluster.
        """
        _require_range(self.labels, self.num_clusters, "labels")
        unused = int((self.sizes == 0).sum())
        if unused:
            raise ValueError(
                f"`labels` must use every label in [0, {self.num_clusters}), got {unused} unused."
            )
        if self.representatives is not None:
            _require_range(self.representatives, self.labels.shape[1], "representatives")
            clusters = torch.arange(self.num_clusters, device=self.labels.device)
            if not (self.labels.gather(1, self.representatives) == clusters).all():
                raise ValueError("`representatives` must be members of their own clusters.")
        return self

    def _check_form(self) -> None:
        _require_indices(self.labels, "labels")
        batch, num_tokens = self.labels.shape
        if not 1 <= self.num_clusters <= num_tokens:
            raise ValueError(
                f"`num_clusters` must be in [1, {num_tokens}], got {self.num_clusters}."
            )
        if self.representatives is not None:
            _require_indices(self.representatives, "representatives")
            expected = (batch, self.num_clusters)
            if tuple(self.representatives.shape) != expected:
                raise ValueError(
                    f"`representatives` must be {list(expected)}, "
                    f"got {list(self.representatives.shape)}."
                )

    def _require_length(self, tensor: Tensor, length: int, name: str) -> None:
        expected = (self.labels.shape[0], length)
        if tensor.ndim != 3 or tuple(tensor.shape[:2]) != expected:
            raise ValueError(
                f"`{name}` must be [{expected[0]}, {expected[1]}, C], got {list(tensor.shape)}."
            )


def _require_indices(indices: Tensor, name: str) -> None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(indices).__name__}.")
    if indices.ndim != 2 or indices.numel() == 0:
        raise ValueError(
            f"`{name}` must be non-empty and two-dimensional, got shape {list(indices.shape)}."
        )
    if indices.dtype != torch.int64:
        raise ValueError(f"`{name}` must be int64, got {indices.dtype}.")


def _require_range(indices: Tensor, end: int, name: str) -> None:
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= end:
        raise ValueError(f"`{name}` must be in [0, {end}), got values from {low} to {high}.")
