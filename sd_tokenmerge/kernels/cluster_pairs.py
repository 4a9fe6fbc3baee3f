"""Least similarities of pairs of clusters, by the matrix where it suffices, else by their tokens.

The matrix (`sd_tokenmerge.kernels.least`) leaves few tokens of a pair of clusters that can attain
the minimum. The products of those are computed, in float32 or exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import best_by_id, rows_per_block, similarity_block
from sd_tokenmerge.kernels.least import LeastSimilarities, least_by_cluster
from sd_tokenmerge.kernels.members import Members, expand
from sd_tokenmerge.kernels.unit_rows import UnitRows

_PAIRS_AT_ONCE = 1 << 14
_BLOCK_COLUMNS = 512
_CLUSTERS_AT_ONCE = 64


@dataclass(frozen=True)
class ClusterPairs:
    """What is known of the similarities of clusters.

    Attributes:
        rows: of the tokens.
        matrix: of the clusters.
        members: of the clusters.
    """

    rows: UnitRows
    matrix: LeastSimilarities
    members: Members

    @property
    def is_coarse(self) -> bool:
        """Whether the matrix knows less than float32 products."""
        return self.matrix.error > self.rows.error

    def exact(self, left: Tensor, right: Tensor) -> Tensor:
        """Least similarity of pairs of clusters, `[P], [P] -> [P]` float64."""
        return self._least(left, right, exactly=True)

    def quick(self, left: Tensor, right: Tensor) -> Tensor:
        """As `exact`, within `rows.error`."""
        if self.is_coarse:
            return self._least(left, right, exactly=False)
        pair, token = self.members.expand(right)
        return _least_of_each(self.matrix.between(left[pair], token), pair, len(left))

    def nearest_of_all(self, clusters: Tensor, columns: Tensor) -> Tensor:
        """Nearest of all clusters by exact similarities of all their tokens, `[M] -> [M]` int64.

        Args:
            clusters: `[M]` int64.
            columns: `[K]` int64, the clusters to look at, by descending size.
        """
        found = []
        for part in torch.split(clusters, _CLUSTERS_AT_ONCE):
            shape = (len(part), len(self.rows))
            least = torch.full(shape, torch.inf, dtype=torch.float64, device=part.device)
            place, token = self.members.expand(part)
            step = rows_per_block(len(self.rows))
            for row, tokens in zip(torch.split(place, step), torch.split(token, step), strict=True):
                ones = self.rows.exact(tokens)
                for start in range(0, len(self.rows), _BLOCK_COLUMNS):
                    block = least[:, start : start + _BLOCK_COLUMNS]
                    everyone = torch.arange(start, start + block.shape[1], device=token.device)
                    exact = similarity_block(ones, self.rows.exact(everyone))
                    block.scatter_reduce_(0, row.unsqueeze(1).expand_as(exact), exact, "amin")
            found.append(best_by_id(least_by_cluster(least, columns, self.members), part, columns))
        return torch.cat(found)

    def _least(self, left: Tensor, right: Tensor, *, exactly: bool) -> Tensor:
        if self.members.are_tokens:
            return self._of_tokens(left, right, exactly)
        left_tokens, left_count = self._attaining(right, left)
        right_tokens, right_count = self._attaining(left, right)
        left_first = left_count.cumsum(0) - left_count
        right_first = right_count.cumsum(0) - right_count
        pairs = left_count * right_count
        lowest = torch.full(left.shape, torch.inf, dtype=torch.float64, device=left.device)
        few = torch.where(pairs <= _PAIRS_AT_ONCE)[0]
        chunk = pairs[few].cumsum(0) // _PAIRS_AT_ONCE
        for part in torch.split(
            few, torch.unique_consecutive(chunk, return_counts=True)[1].tolist()
        ):
            place, nth = expand(pairs[part])
            pair = part[place]
            one = left_tokens[left_first[pair] + nth // right_count[pair]]
            other = right_tokens[right_first[pair] + nth % right_count[pair]]
            lowest.scatter_reduce_(0, pair, self._of_tokens(one, other, exactly), "amin")
        for pair in torch.where(pairs > _PAIRS_AT_ONCE)[0].tolist():
            ones = left_tokens[left_first[pair] :][: left_count[pair]]
            others = right_tokens[right_first[pair] :][: right_count[pair]]
            lowest[pair] = self._least_of_block(ones, others)
        return lowest

    def _attaining(self, clusters: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of `others` that may be the least similar to `clusters`, and how many per pair."""
        pair, token = self.members.expand(others)
        value = self.matrix.between(clusters[pair], token)
        least = _least_of_each(value, pair, len(others))
        near = value <= least[pair] + 2 * self.matrix.error
        return token[near], torch.bincount(pair[near], minlength=len(others))

    def _of_tokens(self, left: Tensor, right: Tensor, exactly: bool) -> Tensor:
        find = self.rows.similarities if exactly else self.rows.quick_similarities
        return find(left, right)

    def _least_of_block(self, tokens: Tensor, others: Tensor) -> Tensor:
        """Exact similarity of the least similar pair of two lists of tokens."""
        found = []
        for columns in torch.split(others, _BLOCK_COLUMNS):
            vectors = self.rows.exact(columns)
            for part in torch.split(tokens, _BLOCK_COLUMNS):
                found.append(similarity_block(self.rows.exact(part), vectors).amin())
        return torch.stack(found).amin()


def _least_of_each(value: Tensor, place: Tensor, count: int) -> Tensor:
    least = value.new_full((count,), torch.inf)
    return least.scatter_reduce_(0, place, value, "amin")
