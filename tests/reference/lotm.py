"""Local Token Merging on lists of clusters (Haroun et al., ICONIP 2024, eq. 10 and 13 to 16)."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from tests.reference.cosine import cosine

Cluster = frozenset[int]


def row_clusters(tokens: np.ndarray, num_clusters: int) -> set[Cluster]:
    """Pairs (1, 2), (3, 4), ... of the sequence, applied again while more than K are left."""
    sequence = [frozenset([token]) for token in range(len(tokens))]
    while len(sequence) > num_clusters:
        starts = range(0, len(sequence) - 1, 2)  # i = 1, 3, 5, ... counted from 1
        similarity = {i: _similarity(tokens, sequence[i], sequence[i + 1]) for i in starts}
        number = len(sequence) - _next_size(len(sequence), num_clusters)
        chosen = sorted(starts, key=lambda i: (-similarity[i], i))[:number]
        merged = []
        for i, cluster in enumerate(sequence):
            if i in chosen:
                merged.append(cluster | sequence[i + 1])
            elif i - 1 not in chosen:
                merged.append(cluster)
        sequence = merged
    return set(sequence)


def grid_clusters(
    tokens: np.ndarray, num_clusters: int, shape: tuple[int, int, int]
) -> set[Cluster]:
    """Pairs of neighbours on a grid (frames, height, width), best first, each cluster once."""
    home = [frozenset([token]) for token in range(len(tokens))]
    places = np.argwhere(np.ones(shape))
    pairs_of_tokens = combinations(range(len(tokens)), 2)
    edges = [(a, b) for a, b in pairs_of_tokens if np.abs(places[a] - places[b]).sum() == 1]
    while len(set(home)) > num_clusters:
        candidates = sorted(
            (-_similarity(tokens, home[a], home[b]), place)
            for place, (a, b) in enumerate(edges)
            if home[a] != home[b]
        )
        number = len(set(home)) - _next_size(len(set(home)), num_clusters)
        used: set[Cluster] = set()
        pairs = []
        for _, place in candidates:
            pair = {home[edges[place][0]], home[edges[place][1]]}
            if not pair & used and len(pairs) < number:
                used |= pair
                pairs.append(pair)
        for one, other in pairs:
            home = [one | other if cluster in (one, other) else cluster for cluster in home]
    return set(home)


def _next_size(size: int, num_clusters: int) -> int:
    applications = math.ceil(math.log2(size / num_clusters))
    exact = size * (num_clusters / size) ** (1 / applications)
    return max(math.ceil(round(exact, 9)), math.ceil(size / 2))


def _similarity(tokens: np.ndarray, one: Cluster, other: Cluster) -> float:
    return cosine(tokens[sorted(one)].mean(0), tokens[sorted(other)].mean(0))
