"""Partitions as sets of sets, which do not depend on the numbering of clusters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable


def as_sets(labels: Iterable[int]) -> set[frozenset[int]]:
    """The clusters of one image, each as the set of its token indices."""
    clusters: dict[int, set[int]] = defaultdict(set)
    for token, label in enumerate(labels):
        clusters[int(label)].add(token)
    return {frozenset(cluster) for cluster in clusters.values()}
