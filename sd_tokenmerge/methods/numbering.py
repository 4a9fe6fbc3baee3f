"""Clusters are numbered by their tokens, so that equal partitions have equal labels."""

from __future__ import annotations

import torch
from torch import Tensor


def labels_from_roots(roots: Tensor) -> Tensor:
    """Number the clusters in the order of their roots, `[B, N] -> [B, N]` int64.

    Args:
        roots: `[B, N]` int64; for each token, the index of the one token that stands for its
            cluster. A root points to itself.
    """
    is_root = roots == torch.arange(roots.shape[1], device=roots.device)
    return (is_root.cumsum(1) - 1).gather(1, roots)


def number_by_first_token(labels: Tensor, num_clusters: int) -> Tensor:
    """Renumber clusters in the order of their first tokens, `[B, N] -> [B, N]` int64.

    Args:
        labels: `[B, N]` int64 in `[0, K)`.
        num_clusters: K.
    """
    batch, count = labels.shape
    tokens = torch.arange(count, device=labels.device).expand(batch, -1)
    first = labels.new_full((batch, num_clusters), count)
    first = first.scatter_reduce(1, labels, tokens, "amin")
    return labels_from_roots(first.gather(1, labels))


def cheapest_members(labels: Tensor, cost: Tensor, num_clusters: int) -> Tensor:
    """The token of lowest cost in each cluster, `[B, N] -> [B, K]` int64.

    Of equal costs the first token wins. An empty cluster gets some valid token index.

    Args:
        labels: `[B, N]` int64 in `[0, K)`.
        cost: `[B, N]` float.
        num_clusters: K.
    """
    by_cost = cost.argsort(dim=1, stable=True)
    sorted_labels, order = labels.gather(1, by_cost).sort(dim=1, stable=True)
    clusters = torch.arange(num_clusters, device=labels.device).expand(len(labels), -1)
    first = torch.searchsorted(sorted_labels, clusters.contiguous())
    return by_cost.gather(1, order.gather(1, first.clamp(max=labels.shape[1] - 1)))
