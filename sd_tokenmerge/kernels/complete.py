"""Complete linkage on cosine distance, on one matrix of token similarities.

The similarity of two clusters is the smallest one between their tokens. Row I of the matrix holds,
for every token t, the smallest similarity between t and the members of I: a merge is the
element-wise minimum of two rows, and columns are never rewritten. When a row is searched, the
columns of each cluster's tokens are reduced to their minimum on the way.

The matrix is float32 and only a filter: where two clusters are about equally near, or a merge's
height is recorded, the few token pairs that can attain the minimum are computed exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import (
    best_by_id,
    best_of_pairs,
    pair_similarities,
    rows_per_block,
    similarity_block,
)
from sd_tokenmerge.kernels.members import Members, expand
from sd_tokenmerge.kernels.rounds import Clusters
from sd_tokenmerge.kernels.search import float32_error, precise_dtype

_BLOCK_ROWS = 512
_LEVELS = 32
_PAIRS_PER_ROW = 64  # above this many exact token pairs, one exact product per member is cheaper
_BLOCK_PAIRS = 1 << 12


class CompleteClusters(Clusters):
    """Clusters under complete linkage.

    Args:
        unit: `[N, C]` float64 unit vectors.

    Raises:
        MemoryError: the matrix does not fit; the message states its bytes.
    """

    def __init__(self, unit: Tensor) -> None:
        super().__init__(len(unit), unit.device)
        self._unit = unit
        self._error = float32_error(unit.shape[1])
        self._dormant = torch.zeros_like(self.alive)
        self._upper = unit.new_full((len(unit),), torch.inf)  # bound on similarities to all others
        self._rest = self._upper.clone()  # bound on similarities to all but the nearest
        self._members = Members(self.root)
        working = unit.to(precise_dtype(unit.device))
        self._smallest = _allocate(len(unit), working)
        for rows, out in zip(
            torch.split(working, _BLOCK_ROWS), torch.split(self._smallest, _BLOCK_ROWS), strict=True
        ):
            torch.mm(rows, working.T, out=out)

    def first_neighbours(self) -> Tensor:
        """See `Clusters`."""
        return self._search(self.root.clone(), torch.tensor(-torch.inf, device=self.root.device))

    def neighbours(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """See `Clusters`."""
        return self._search(clusters, floor)

    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Clusters`."""
        left_pair, left_token = self._attaining(right, left)
        right_pair, right_token = self._attaining(left, right)
        pairs = len(left)
        left_count = torch.bincount(left_pair, minlength=pairs)
        right_count = torch.bincount(right_pair, minlength=pairs)
        left_first = left_count.cumsum(0) - left_count
        right_first = right_count.cumsum(0) - right_count
        lowest = self._unit.new_full((pairs,), torch.inf)
        total = left_count * right_count
        few = torch.where(total <= _BLOCK_PAIRS)[0]
        start = 0
        ends = (total[few].cumsum(0) // (16 * _BLOCK_PAIRS)).bincount().cumsum(0).tolist()
        for end in ends:
            part = few[start:end]
            start = end
            place, nth = expand(total[part])
            pair = part[place]
            one = left_token[left_first[pair] + nth // right_count[pair]]
            other = right_token[right_first[pair] + nth % right_count[pair]]
            exact = pair_similarities(self._unit[one], self._unit[other])
            lowest.scatter_reduce_(0, pair, exact, "amin")
        for pair in torch.where(total > _BLOCK_PAIRS)[0].tolist():
            ones = self._unit[left_token[left_pair == pair]]
            others = self._unit[right_token[right_pair == pair]]
            lowest[pair] = torch.stack(
                [
                    similarity_block(part, others).amin()
                    for part in torch.split(ones, rows_per_block(len(others)))
                ]
            ).amin()
        return lowest

    def merge(self, left: Tensor, right: Tensor) -> None:
        """See `Clusters`."""
        for one, other in zip(
            torch.split(left, _BLOCK_ROWS), torch.split(right, _BLOCK_ROWS), strict=True
        ):
            self._smallest[one] = torch.minimum(self._smallest[one], self._smallest[other])
        self._upper[left] = torch.minimum(self._rest[left], self._rest[right])
        self.join(left, right)
        self._members = Members(self.root)

    def _attaining(self, clusters: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of `others` that can be the least similar to `clusters`: pair's number, token."""
        pair, token = self._members.expand(others)
        value = self._smallest[clusters[pair], token]
        least = value.new_full((len(others),), torch.inf).scatter_reduce(0, pair, value, "amin")
        near = value <= least[pair] + 2 * self._error
        return pair[near], token[near]

    def _search(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """Nearest cluster of the given ones, or itself where none reaches `floor`."""
        nearest = clusters.clone()
        promising = torch.where(self._upper[clusters] >= floor)[0]
        columns = torch.where(self.alive & ~self._dormant)[0]
        columns = columns[torch.argsort(self._members.sizes[columns], descending=True, stable=True)]
        for part in torch.split(promising, _BLOCK_ROWS):
            nearest[part] = self._search_block(clusters[part], columns, floor)
        self._dormant[clusters[nearest == clusters]] = True
        return nearest

    def _search_block(self, clusters: Tensor, columns: Tensor, floor: Tensor) -> Tensor:
        similarity = self._least_by_cluster(self._smallest[clusters], columns)
        similarity.masked_fill_(clusters.unsqueeze(1) == columns, -torch.inf)
        best, place = similarity.max(1, keepdim=True)
        second = similarity.scatter(1, place, -torch.inf).amax(1).double()
        candidate = similarity >= best - 2 * self._error
        best, nearest = best.squeeze(1).double(), columns[place.squeeze(1)]
        self._upper[clusters] = best + self._error
        self._rest[clusters] = second + self._error
        hopeless = (best + self._error < floor) | (best == -torch.inf)
        unproven = torch.where(~hopeless & (best - self._error <= second + self._error))[0]
        if len(unproven):
            row, column = torch.where(candidate[unproven])
            nearest[unproven] = self._nearest_of(clusters[unproven], row, columns[column], columns)
        return torch.where(hopeless, clusters, nearest)

    def _least_by_cluster(self, values: Tensor, columns: Tensor) -> Tensor:
        """Minimum over each cluster's tokens, `[M, N] -> [M, clusters]`, largest first."""
        sizes = self._members.sizes[columns]
        larger = (
            (sizes > torch.arange(_LEVELS + 1, device=sizes.device).unsqueeze(1)).sum(1).tolist()
        )
        least = values.index_select(1, self._members.nth(columns, 0))
        for level in range(1, _LEVELS):
            if not (count := larger[level]):
                break
            tokens = self._members.nth(columns[:count], level)
            least[:, :count] = torch.minimum(least[:, :count], values.index_select(1, tokens))
        for place in range(larger[_LEVELS]):
            tokens = self._members.expand(columns[place : place + 1])[1]
            least[:, place] = values.index_select(1, tokens).amin(1)
        return least

    def _nearest_of(self, clusters: Tensor, row: Tensor, others: Tensor, columns: Tensor) -> Tensor:
        """Nearest of the candidate pairs `(clusters[row], others)` by exact similarities."""
        sizes = self._members.sizes
        pairs = torch.zeros_like(clusters).scatter_add_(0, row, sizes[others])
        many = pairs > _PAIRS_PER_ROW
        nearest = clusters.clone()
        few = torch.where(~many)[0]
        if len(few):
            kept = ~many[row]
            place = ((~many).cumsum(0) - 1)[row[kept]]
            exact = self.similarity(clusters[row[kept]], others[kept])
            nearest[few] = best_of_pairs(exact, place, clusters[few], others[kept])
        for place in torch.split(torch.where(many)[0], _BLOCK_ROWS):
            nearest[place] = self._nearest_of_all(clusters[place], columns)
        return nearest

    def _nearest_of_all(self, clusters: Tensor, columns: Tensor) -> Tensor:
        """Nearest of all clusters by exact similarities of all their tokens."""
        least = self._unit.new_full((len(clusters), len(self._unit)), torch.inf)
        place, token = self._members.expand(clusters)
        step = rows_per_block(len(self._unit))
        for part, tokens in zip(torch.split(place, step), torch.split(token, step), strict=True):
            exact = similarity_block(self._unit[tokens], self._unit)
            least.scatter_reduce_(0, part.unsqueeze(1).expand_as(exact), exact, "amin")
        return best_by_id(self._least_by_cluster(least, columns), clusters, columns)


def _allocate(num_tokens: int, like: Tensor) -> Tensor:
    """An N x N matrix, or an error that says what it needs."""
    needed = num_tokens**2 * like.element_size()
    try:
        return like.new_empty(num_tokens, num_tokens)
    except RuntimeError as error:
        raise MemoryError(
            f"complete linkage needs {needed:,} bytes for one {num_tokens} x {num_tokens} matrix "
            f"on {like.device}, which could not be allocated. Average linkage needs no such matrix."
        ) from error
