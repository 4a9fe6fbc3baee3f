"""Agglomerative clustering by SciPy's hierarchy, and what makes a hierarchy valid under ties."""

from __future__ import annotations

import numpy as np
from scipy.cluster.hierarchy import linkage as scipy_linkage
from scipy.spatial.distance import squareform


def cosine_distances(tokens: np.ndarray) -> np.ndarray:
    """`[N, C] -> [N, N]` float64; the cosine of a zero vector is 0."""
    tokens = tokens.astype(np.float64)
    norm = np.linalg.norm(tokens, axis=1, keepdims=True)
    unit = tokens / np.where(norm > 0, norm, 1)
    distances = 1 - unit @ unit.T
    np.fill_diagonal(distances, 0)
    return (distances + distances.T) / 2


def scipy_tree(tokens: np.ndarray, linkage: str) -> np.ndarray:
    """SciPy's linkage matrix, `[N, C] -> [N - 1, 4]`."""
    return scipy_linkage(squareform(cosine_distances(tokens), checks=False), linkage)


def cut(tree: np.ndarray, num_clusters: int) -> np.ndarray:
    """The clusters after exactly the N - K lowest merges, `[N - 1, 4] -> [N]`, by first token."""
    count = len(tree) + 1
    label = np.arange(count)
    members = [[token] for token in range(count)]
    for one, other, *_ in tree[: count - num_clusters]:
        members.append(members[int(one)] + members[int(other)])
    for cluster in members[count:]:  # later ones contain earlier ones
        label[cluster] = min(cluster)
    return np.unique(label, return_inverse=True)[1]


def agglomerative_labels(tokens: np.ndarray, num_clusters: int, linkage: str) -> np.ndarray:
    """Cut the hierarchy at exactly K clusters, `[N, C] -> [N]`, numbered by their first token."""
    if len(tokens) == 1:
        return np.zeros(1, dtype=np.int64)
    return cut(scipy_tree(tokens, linkage), num_clusters)


def heights(
    distances: np.ndarray, merges: list[tuple[int, int, float]], linkage: str
) -> list[float]:
    """The distance between the clusters that each merge joins.

    Args:
        distances: `[N, N]` float64 between tokens.
        merges: a token of the one cluster, a token of the other, and anything.
        linkage: how to measure between clusters.
    """
    reduce = {"single": np.min, "complete": np.max, "average": np.mean}[linkage]
    members = {token: [token] for token in range(len(distances))}
    found = []
    for one, other, _ in merges:
        left, right = members[one], members[other]
        found.append(float(reduce(distances[np.ix_(left, right)])))
        members.update(dict.fromkeys(left + right, left + right))
    return found


def greedy_violation(
    distances: np.ndarray, merges: list[tuple[int, int, float]], linkage: str
) -> float:
    """How far a sequence of merges is from always merging a closest pair, at worst.

    Args:
        distances: `[N, N]` float64 between tokens.
        merges: a token of the one cluster, a token of the other, the height; lowest first.
        linkage: how to measure between clusters.

    Returns:
        The largest difference between a merge's height, the distance of the clusters it merges and
        the smallest distance there was. Under ties many sequences are valid: all those near 0.
    """
    reduce = {"single": np.min, "complete": np.max, "average": np.mean}[linkage]
    clusters = [frozenset([token]) for token in range(len(distances))]
    worst = 0.0
    for one, other, height in merges:
        between = {
            (a, b): reduce(distances[np.ix_(sorted(a), sorted(b))])
            for i, a in enumerate(clusters)
            for b in clusters[:i]
        }
        a = next(cluster for cluster in clusters if one in cluster)
        b = next(cluster for cluster in clusters if other in cluster)
        made = between[(a, b)] if (a, b) in between else between[(b, a)]
        worst = max(worst, abs(made - min(between.values())), abs(made - height))
        clusters = [cluster for cluster in clusters if cluster not in (a, b)] + [a | b]
    return worst
