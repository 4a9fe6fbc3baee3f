"""Random clusters, a control: what merging costs if the clusters carry no information.

Each of K tokens drawn without replacement starts a cluster, and every other token joins a cluster
drawn uniformly. The draw depends only on the seed and is the same for all images of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.methods.numbering import labels_from_roots
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class RandomClusters(Method):
    """Clusters drawn from the seed, ignoring the tokens' features."""

    name: ClassVar[str] = "random"

    @property
    def uses_seed(self) -> bool:
        """True."""
        return True

    @property
    def uses_tokens(self) -> bool:
        """False."""
        return False

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        count = grid.num_tokens
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(count, generator=generator)
        joined = torch.randint(num_clusters, (count - num_clusters,), generator=generator)
        roots = torch.empty(count, dtype=torch.int64)
        roots[order[:num_clusters]] = order[:num_clusters]
        roots[order[num_clusters:]] = order[joined]
        labels = labels_from_roots(roots.unsqueeze(0)).to(tokens.device)
        return Partition(labels.repeat(len(tokens), 1), num_clusters)
