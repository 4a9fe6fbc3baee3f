"""Least similarities of pairs of clusters, by the products of their tokens.

All products of a pair are computed in float32. Where the least one is to be known exactly, those
that are close to it are computed again, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import best_by_id, rows_per_block, similarity_block
from sd_tokenmerge.kernels.levels import Levels
from sd_tokenmerge.kernels.members import Members, expand
from sd_tokenmerge.kernels.search import precise_dtype
from sd_tokenmerge.kernels.unit_rows import UnitRows

_PAIRS_AT_ONCE = 1 << 14
_PAIRS_ONE_BY_ONE = 1 << 9  # with more token pairs, a matrix product is cheaper
_BLOCK_COLUMNS = 512
_CLUSTERS_AT_ONCE = 32


@dataclass(frozen=True)
class ClusterPairs:
    """What is known of the similarities of clusters.

    Attributes:
        rows: of the tokens.
        members: of the clusters.
    """

    rows: UnitRows
    members: Members

    def exact(self, left: Tensor, right: Tensor) -> Tensor:
        """Least similarity of pairs of clusters, `[P], [P] -> [P]` float64."""
        return self._least(left, right, exactly=True)

    def quick(self, left: Tensor, right: Tensor) -> Tensor:
        """As `exact`, within `rows.error`."""
        return self._least(left, right, exactly=False)

    def nearest_of_all(self, clusters: Tensor, columns: Tensor) -> Tensor:
        """Nearest of all clusters by exact similarities of all their tokens, `[M] -> [M]` int64.

        Args:
            clusters: `[M]` int64.
            columns: `[K]` int64, the clusters to look at, by descending size.
        """
        found = []
        levels = Levels(columns, self.members)
        width = len(levels.tokens)
        for part in torch.split(clusters, _CLUSTERS_AT_ONCE):
            shape = (len(part), width)
            least = torch.full(shape, torch.inf, dtype=torch.float64, device=part.device)
            place, token = self.members.expand(part)
            step = rows_per_block(width)
            for row, tokens in zip(torch.split(place, step), torch.split(token, step), strict=True):
                ones = self.rows.exact(tokens)
                for start in range(0, width, _BLOCK_COLUMNS):
                    block = least[:, start : start + _BLOCK_COLUMNS]
                    others = levels.tokens[start : start + _BLOCK_COLUMNS]
                    exact = similarity_block(ones, self.rows.exact(others))
                    block.scatter_reduce_(0, row.unsqueeze(1).expand_as(exact), exact, "amin")
            found.append(best_by_id(levels.least(least, 1), part, columns))
        return torch.cat(found)

    def _least(self, left: Tensor, right: Tensor, *, exactly: bool) -> Tensor:
        if self.members.are_tokens:
            find = self.rows.similarities if exactly else self.rows.quick_similarities
            return find(left, right)
        sizes = self.members.sizes
        pairs = sizes[left] * sizes[right]
        is_small = pairs <= _PAIRS_ONE_BY_ONE
        small, large = torch.where(is_small)[0], torch.where(~is_small)[0]
        lowest = torch.full(left.shape, torch.inf, dtype=torch.float64, device=left.device)
        chunk = pairs[small].cumsum(0) // _PAIRS_AT_ONCE
        counts = torch.unique_consecutive(chunk, return_counts=True)[1].tolist()
        for part in torch.split(small, counts):
            lowest[part] = self._of_small(left[part], right[part], exactly)
        for pair in large.tolist():
            ones, others = (self.members.expand(side[pair : pair + 1])[1] for side in (left, right))
            lowest[pair] = self._of_large(ones, others, exactly)
        return lowest

    def _of_small(self, left: Tensor, right: Tensor, exactly: bool) -> Tensor:
        """The least similarity of pairs of clusters, each token pair on its own."""
        sizes = self.members.sizes
        pair, nth = expand(sizes[left] * sizes[right])
        width = sizes[right][pair]
        one = self.members.nth(left[pair], nth // width)
        other = self.members.nth(right[pair], nth % width)
        value = self.rows.quick_similarities(one, other)
        least = _least_of_each(value, pair, len(left))
        if not exactly:
            return least
        near = value <= least[pair] + 2 * self.rows.error
        exact = self.rows.similarities(one[near], other[near])
        return _least_of_each(exact, pair[near], len(left))

    def _of_large(self, ones: Tensor, others: Tensor, exactly: bool) -> Tensor:
        """The least similarity between two lists of tokens."""
        of_ones, of_others = self._quick_minima(ones, others)
        least = of_ones.amin()
        if not exactly:
            return least
        threshold = least + 2 * self.rows.error
        found = []
        ones, others = ones[of_ones <= threshold], others[of_others <= threshold]
        for columns in torch.split(others, _BLOCK_COLUMNS):
            vectors = self.rows.exact(columns)
            for part in torch.split(ones, _BLOCK_COLUMNS):
                found.append(similarity_block(self.rows.exact(part), vectors).amin())
        return torch.stack(found).amin()

    def _quick_minima(self, ones: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """What is the least similar to each token of two lists, within `rows.error`, float64."""
        dtype = precise_dtype(ones.device)
        of_ones = torch.full(ones.shape, torch.inf, dtype=dtype, device=ones.device)
        of_others = []
        for columns in torch.split(others, _BLOCK_COLUMNS):
            vectors = self.rows.exact(columns).to(dtype)
            least = of_ones.new_full(columns.shape, torch.inf)
            for start in range(0, len(ones), _BLOCK_COLUMNS):
                part = slice(start, start + _BLOCK_COLUMNS)
                product = self.rows.exact(ones[part]).to(dtype) @ vectors.T
                of_ones[part] = torch.minimum(of_ones[part], product.amin(1))
                least = torch.minimum(least, product.amin(0))
            of_others.append(least)
        return of_ones.double(), torch.cat(of_others).double()


def _least_of_each(value: Tensor, place: Tensor, count: int) -> Tensor:
    least = value.new_full((count,), torch.inf)
    return least.scatter_reduce_(0, place, value, "amin")
