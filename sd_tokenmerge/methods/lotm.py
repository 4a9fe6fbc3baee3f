"""Local Token Merging (Haroun et al., ICONIP 2024): only adjacent tokens are merged.

One application compares adjacent tokens by cosine similarity (eq. 13) and merges the most similar
pairs (eq. 14 to 16). It removes at most half of the tokens. The paper applies it in several layers,
one after the other ("progressively"); around a single attention, a K below N / 2 is reached by
applying it again to the merged tokens, as often as needed. The sizes in between form a geometric
series, so that every application has pairs to choose from; halving as often as possible would merge
all pairs, alike or not. Deterministic.

Deviation: eq. 15 halves the sum of two tokens that may be merged ones already. Here a merged token
is the mean of all its original tokens (eq. 10), which is what `Partition.merge` returns; for a
single application the two are the same.
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
        neighbours: which tokens may form a pair. `"row"`, the paper's: tokens (1, 2), (3, 4), ...
            of the row-major sequence. `"grid"`: a token and its right or lower neighbour; pairs are
            taken in the order of similarity, each token in at most one, and a merged token has the
            neighbours of both its tokens. Where fewer pairs than asked for are disjoint, there is
            one application more.
    """

    name: ClassVar[str] = "lotm"
    neighbours: Literal["row", "grid"] = "row"

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        if self.neighbours == "grid":
            images = [merge_on_grid(image, num_clusters, grid) for image in tokens]
            labels = torch.stack(images)
        else:
            labels = merge_in_sequence(tokens, num_clusters)
        return Partition(labels, num_clusters)
