"""Agglomerative Token Clustering (Haurum et al., ECCV 2024).

Clusters are built bottom-up: the two closest are combined until K remain (section 3.2), by cosine
distance with single (eq. 1), complete (eq. 2) or average (eq. 3) linkage. Deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sd_tokenmerge.kernels.agglomerative import agglomerative_labels
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class ATC(Method):
    """Agglomerative clustering by cosine distance.

    Attributes:
        linkage: distance between clusters: `"single"` (eq. 1), `"complete"` (eq. 2) or `"average"`
            (eq. 3).
    """

    name: ClassVar[str] = "atc"
    linkage: Literal["single", "complete", "average"] = "average"

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        labels = agglomerative_labels(tokens, num_clusters, self.linkage)
        return Partition(labels, num_clusters)
