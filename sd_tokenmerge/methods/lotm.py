"""Local Token Merging (Haroun et al., ICONIP 2024): only adjacent tokens are merged.

One application compares adjacent tokens by cosine similarity (eq. 13) and merges the most similar
pairs (eq. 14 to 16). It removes at most half of the tokens. The paper applies it in several layers,
one after the other ("progressively"); around a single attention, a K below N / 2 is reached by
applying it again to the merged tokens, as often as needed. The sizes in between form a geometric
series, so that every application still has pairs to choose from. Deterministic.

Deviation: eq. 15 halves the sum of two tokens that may be merged ones already. Here a merged token
is the mean of all its original tokens (eq. 10), which is what `Partition.merge` returns; for a
single application the two are the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sd_tokenmerge.kernels.segments import segment_sum
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.methods.distances import unit_tokens
from sd_tokenmerge.methods.grid_pairs import merge_grid_neighbours
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class LoTM(Method):
    """Merging of the most similar pairs of adjacent tokens.

    Attributes:
        neighbours: which tokens may form a pair. `"row"`, the paper's: tokens (1, 2), (3, 4), ...
            of the row-major sequence. `"grid"`: a token and its right or lower neighbour; pairs are
            chosen in the order of similarity, each token in at most one; a merged token has all
            neighbours of its two tokens.
    """

    name: ClassVar[str] = "lotm"
    neighbours: Literal["row", "grid"] = "row"

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        if self.neighbours == "grid":
            labels = torch.stack(
                [merge_grid_neighbours(image, num_clusters, grid) for image in tokens]
            )
        else:
            labels = _merge_sequence(tokens, num_clusters)
        return Partition(labels, num_clusters)


def next_size(num_tokens: int, num_clusters: int) -> int:
    """How many of M tokens to keep in the next application on the way to K: M (K/M)^(1/n).

    n is the number of applications left, the smallest with M / 2^n <= K.
    """
    left = 1
    while num_clusters << left < num_tokens:
        left += 1
    size = math.ceil(num_tokens * math.pow(num_clusters / num_tokens, 1 / left))
    return max(min(size, num_clusters << (left - 1)), (num_tokens + 1) // 2)


def _merge_sequence(tokens: Tensor, num_clusters: int) -> Tensor:
    batch, size, _ = tokens.shape
    labels = torch.arange(size, device=tokens.device).repeat(batch, 1)
    while size > num_clusters:
        next_ = next_size(size, num_clusters)
        # The sum of a cluster has the direction of its mean, and eq. 13 compares directions.
        unit = unit_tokens(segment_sum(tokens, labels, size))
        pairs = size // 2
        # eq. (13)
        similarity = (unit[:, 0 : 2 * pairs : 2] * unit[:, 1 : 2 * pairs : 2]).sum(-1)
        # eq. (14)
        chosen = similarity.argsort(dim=1, descending=True, stable=True)[:, : size - next_]
        # eq. (16): the second token of a chosen pair takes the place of the first
        starts = torch.ones_like(labels[:, :size], dtype=torch.bool)
        starts.scatter_(1, 2 * chosen + 1, False)
        labels = (starts.cumsum(1) - 1).gather(1, labels)
        size = next_
    return labels
