"""Canonical numbering of clusters by their tokens, so that equal partitions have equal labels."""

from __future__ import annotations

import torch
from torch import Tensor


def labels_from_roots(roots: Tensor) -> Tensor:
    """Number the clusters in the order of their roots, `[B, N] -> [B, N]` int64.

    Args:
        roots: `[B, N]` int64; for each token, the index of its cluster's root, which is a member
            that points to itself.
    """
    is_root = roots == torch.arange(roots.shape[1], device=roots.device)
    return (is_root.cumsum(1) - 1).gather(1, roots)


def number_by_first_token(labels: Tensor, num_clusters: int) -> Tensor:
    """Renumber clusters in the order of their first tokens, `[B, N] -> [B, N]` int64.

    Args:
        labels: `[B, N]` int64 in `[0, K)`.
        num_clusters: K.
    """
    first = cheapest_members(labels, torch.zeros_like(labels, dtype=torch.float32), num_clusters)
    return labels_from_roots(first.gather(1, labels))


def cheapest_members(labels: Tensor, cost: Tensor, num_clusters: int) -> Tensor:
    """The token of lowest cost in each cluster, `[B, N] -> [B, K]` int64; N for an empty cluster.

    Args:
        labels: `[B, N]` int64 in `[0, K)`.
        cost: `[B, N]` float, non-negative, not NaN; the first token wins a tie.
        num_clusters: K.
    """
    batch, count = labels.shape
    lowest = cost.new_full((batch, num_clusters), torch.inf)
    lowest = lowest.scatter_reduce(1, labels, cost, "amin")
    is_lowest = cost == lowest.gather(1, labels)
    tokens = torch.arange(count, device=labels.device)
    first = labels.new_full((batch, num_clusters), count)
    return first.scatter_reduce(1, labels, torch.where(is_lowest, tokens, count), "amin")
