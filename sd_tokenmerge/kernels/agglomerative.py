"""Exact agglomerative clustering on cosine distance, by SciPy's hierarchy (to be replaced)."""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage as scipy_linkage
from torch import Tensor


def agglomerative_labels(tokens: Tensor, num_clusters: int, linkage: str) -> Tensor:
    """Cut each image's hierarchy at K clusters, `[B, N, C] -> [B, N]` int64."""
    return torch.stack([_labels(row, num_clusters, linkage) for row in tokens]).to(tokens.device)


def _labels(tokens: Tensor, num_clusters: int, linkage: str) -> Tensor:
    count = tokens.shape[0]
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1).cpu().numpy()
    distance = np.clip(1 - unit @ unit.T, 0, 2)
    tree = scipy_linkage(distance[np.triu_indices(count, 1)], linkage)
    parent = list(range(2 * count - 1))
    for merge in range(count - num_clusters):  # exactly the N - K lowest merges, ties included
        parent[int(tree[merge, 0])] = parent[int(tree[merge, 1])] = count + merge
    roots = []
    for token in range(count):
        while parent[token] != token:
            token = parent[token]
        roots.append(token)
    return torch.from_numpy(np.unique(roots, return_inverse=True)[1]).long()
