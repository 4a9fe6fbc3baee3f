"""Density peaks by k nearest neighbours, one token at a time (Zeng et al., CVPR 2022)."""

from __future__ import annotations

import math

import numpy as np


def dpc_knn_labels(tokens: np.ndarray, num_clusters: int, k: int) -> list[int]:
    """The center that each token joins, as a position in the list of centers."""
    count, channels = tokens.shape
    distance = [[math.dist(a, b) / math.sqrt(channels) for b in tokens] for a in tokens]
    density = [math.exp(-sum(d * d for d in sorted(row)[:k]) / k) for row in distance]
    largest = max(max(row) for row in distance)
    score = []
    for i in range(count):
        higher = [distance[i][j] for j in range(count) if density[j] > density[i]]
        score.append(density[i] * min(higher, default=largest))
    centers = sorted(range(count), key=lambda i: -score[i])[:num_clusters]
    labels = [min(range(num_clusters), key=lambda c: distance[i][centers[c]]) for i in range(count)]
    for number, center in enumerate(centers):
        labels[center] = number
    return labels
