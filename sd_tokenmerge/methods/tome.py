"""Token Merging (Bolya et al., "Token Merging: Your ViT but Faster", ICLR 2023).

Bipartite soft matching (section 3) between alternating tokens in row-major order: tokens 0, 2, 4,
... are sources, tokens 1, 3, 5, ... destinations. Deterministic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.methods.bipartite import match_bipartite
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class ToMe(Method):
    """Alternating bipartite soft matching; keeps at least half of the tokens."""

    name: ClassVar[str] = "tome"

    def smallest_num_clusters(self, grid: Grid) -> int:
        """N / 2, rounded up."""
        return (grid.num_tokens + 1) // 2

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        index = torch.arange(grid.num_tokens, device=tokens.device)
        labels = match_bipartite(tokens, index[0::2], index[1::2], num_clusters)
        return Partition(labels, num_clusters)
