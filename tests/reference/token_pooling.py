"""K-Means and K-Medoids with loops and full distances (Marin et al., WACV 2023)."""

from __future__ import annotations

import numpy as np


def squared(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Euclidean distance."""
    return float(((a - b) ** 2).sum())


def farthest_first(tokens: np.ndarray, num_clusters: int) -> list[int]:
    """Gonzalez' traversal from the token nearest to the mean."""
    mean = tokens.mean(0)
    chosen = [min(range(len(tokens)), key=lambda i: squared(tokens[i], mean))]
    while len(chosen) < num_clusters:
        rest = [i for i in range(len(tokens)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(squared(tokens[i], tokens[c]) for c in chosen)))
    return chosen


def highest(scores: np.ndarray, num_clusters: int) -> list[int]:
    """The K tokens of highest score."""
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:num_clusters]


def kmeans_labels(
    tokens: np.ndarray, start: list[int], weights: np.ndarray, iterations: int
) -> list[int]:
    """K-Means from tokens as centers."""
    return lloyd(tokens, _assign_to_centers(tokens, tokens[start]), weights, iterations)


def lloyd(tokens: np.ndarray, labels: list[int], weights: np.ndarray, iterations: int) -> list[int]:
    """Lloyd's iterations; an empty cluster takes the movable token farthest from its center."""
    for _ in range(iterations):
        centers = []
        for k in range(max(labels) + 1):
            members = [i for i, label in enumerate(labels) if label == k]
            w = weights[members]
            w = w if w.sum() > 0 else np.ones_like(w)
            centers.append((tokens[members] * w[:, None]).sum(0) / w.sum())
        labels = _assign_to_centers(tokens, np.array(centers))
    return labels


def kmedoids(
    tokens: np.ndarray, start: list[int], weights: np.ndarray, iterations: int
) -> tuple[list[int], list[int]]:
    """Labels and medoids; a medoid has the smallest weighted sum of squared distances.

    A medoid stays unless another token is better: the two tokens of a pair are equally good.
    """
    medoids = list(start)
    for _ in range(iterations):
        labels = _assign_to_medoids(tokens, medoids)
        for k in range(len(medoids)):
            members = [i for i, label in enumerate(labels) if label == k]
            w = weights if weights[members].sum() > 0 else np.ones_like(weights)
            cost = {i: sum(w[j] * squared(tokens[i], tokens[j]) for j in members) for i in members}
            best = min(members, key=cost.__getitem__)
            if cost[best] < cost[medoids[k]] * (1 - 1e-9):
                medoids[k] = best
    return _assign_to_medoids(tokens, medoids), medoids


def _assign_to_centers(tokens: np.ndarray, centers: np.ndarray) -> list[int]:
    distance = [[squared(token, center) for center in centers] for token in tokens]
    labels = [int(np.argmin(row)) for row in distance]
    own = [distance[i][label] for i, label in enumerate(labels)]
    keepers = set()
    for k in set(labels):
        keepers.add(min((i for i, label in enumerate(labels) if label == k), key=lambda i: own[i]))
    movable = sorted((i for i in range(len(tokens)) if i not in keepers), key=lambda i: -own[i])
    empty = [k for k in range(len(centers)) if k not in labels]
    for token, k in zip(movable, empty, strict=False):
        labels[token] = k
    return labels


def _assign_to_medoids(tokens: np.ndarray, medoids: list[int]) -> list[int]:
    labels = [int(np.argmin([squared(t, tokens[m]) for m in medoids])) for t in tokens]
    for k, medoid in enumerate(medoids):
        labels[medoid] = k
    return labels
