"""Local Token Merging (Haroun et al., ICONIP 2024): only adjacent tokens are merged.

One application compares adjacent tokens by cosine similarity (eq. 13) and merges the most similar
pairs (eq. 14 to 16), at most half of the tokens. The paper applies it in one layer after the other
("progressively"). Around a single attention, a K below N / 2 is reached by applying it again to the
merged tokens; sizes then follow a geometric series, so that every application can choose among
pairs instead of merging all of them. Deterministic.

Deviation: eq. 15 halves the sum of two tokens, even if they are merged tokens. Here, a merged token
is the mean of all its original tokens (eq. 10), as `Partition.merge` returns it. The two agree for
a single application.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sd_tokenmerge.methods.adjacent_pairs import merge_in_sequence, merge_on_grid
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class LoTM(Method):
    """Merging of the most similar pairs of adjacent tokens.

    Attributes:
        neighbours: which tokens may be paired. `"row"`, as in the paper: (1, 2), (3, 4), ... of the
            row-major sequence, one frame of a video after the other. `"grid"`: any token with its
            horizontal or vertical neighbours, or the same place in the previous or next frame, most
            similar pair first, each token in at most one pair; a merged token has the neighbours of
            all its tokens. If there are too few disjoint pairs, another application follows.
    """

    name: ClassVar[str] = "lotm"
    neighbours: Literal["row", "grid"] = "row"

    @property
    def uses_grid(self) -> bool:
        """True for pairs on the grid."""
        return self.neighbours == "grid"

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        if self.neighbours == "grid":
            images = [merge_on_grid(image, num_clusters, grid) for image in tokens]
            labels = torch.stack(images)
        else:
            labels = merge_in_sequence(tokens, num_clusters)
        return Partition(labels, num_clusters)
