"""Bipartite soft matching, one token at a time (Bolya et al., ICLR 2023, section 3)."""

from __future__ import annotations

import numpy as np

from tests.reference.cosine import cosine


def bipartite_clusters(
    tokens: np.ndarray, destinations: list[int], num_clusters: int
) -> set[frozenset[int]]:
    """Merge the most similar sources, `[N, C]`, into their destinations until K clusters remain."""
    sources = [token for token in range(len(tokens)) if token not in destinations]
    edges = []
    for source in sources:
        best = max(destinations, key=lambda d: (cosine(tokens[source], tokens[d]), -d))
        edges.append((cosine(tokens[source], tokens[best]), source, best))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    clusters = {token: {token} for token in range(len(tokens))}
    for _, source, destination in edges[: len(tokens) - num_clusters]:
        clusters[destination] |= clusters.pop(source)
    return {frozenset(cluster) for cluster in clusters.values()}


def top_left_destinations(height: int, width: int, stride: int) -> list[int]:
    """The top-left token of each whole cell."""
    return [
        y * width + x
        for y in range(0, height - stride + 1, stride)
        for x in range(0, width - stride + 1, stride)
    ]
