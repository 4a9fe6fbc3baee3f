"""Complete linkage on cosine distance, on a matrix of similarities.

The similarity of two clusters is the smallest one between their tokens. The matrix holds it in
float32 for all pairs of clusters, so that a search looks rows up and a merge is the minimum of two
rows. It takes 4 N^2 bytes per image: 64 MiB for 4,096 tokens, 324 MiB for 9,216.

Where float32 does not say which cluster is nearest, and for every merge's height, the products of
the clusters' tokens are computed again, and those close to the smallest exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import pair_similarities
from sd_tokenmerge.kernels.rounds import Clusters
from sd_tokenmerge.kernels.search import Lists, float32_error, list_largest, precise_dtype
from sd_tokenmerge.kernels.vectors import UnitVectors, blocks

_PAIR_ELEMENTS = 1 << 17  # numbers of vectors compared pair by pair
_BLOCK_ELEMENTS = 1 << 20  # similarities in one block
_WASTE = 1.2  # matrix columns per column in play from which on the others are thrown away


class CompleteClusters(Clusters):
    """Clusters under complete linkage; see `Clusters`.

    Args:
        tokens: `[N, C]`, any float dtype.

    Raises:
        ValueError: `tokens` are not finite.
        MemoryError: there is no memory for the matrix.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.num_tokens, channels = tokens.shape
        self.device = tokens.device
        self.error = float32_error(channels)
        self._pairs_at_once = max(1, _PAIR_ELEMENTS // channels)
        self._unit = UnitVectors(tokens)
        self._rounded = self._unit.rounded(precise_dtype(tokens.device))
        everyone = torch.arange(len(tokens), device=tokens.device)
        self._root = everyone.clone()
        self._place = everyone.clone()  # of clusters in the matrix; -1 if they have none
        self._columns = everyone.clone()  # clusters by their places
        self._list_members()
        self._matrix = self._empty_matrix()
        for rows, some in blocks(self._rows_at_once, self._matrix, self._rounded):
            rows.copy_(some @ self._rounded.T)

    def _empty_matrix(self) -> Tensor:
        count = self.num_tokens
        try:
            return torch.empty(count, count, dtype=torch.float32, device=self.device)
        except (MemoryError, RuntimeError) as error:  # torch raises either, by device
            raise MemoryError(
                f"complete linkage of {count:,} tokens needs a matrix of {4 * count**2:,} bytes on"
                f" {self.device}, which cannot be allocated. Average and single linkage need none."
            ) from error

    @property
    def _rows_at_once(self) -> int:
        return max(1, _BLOCK_ELEMENTS // len(self._columns))

    def search(self, rows: Tensor, columns: Tensor) -> Lists:
        """See `Clusters`."""
        if len(self._columns) > _WASTE * len(columns):
            self._leave_only(columns)
        out_of_play = torch.ones(len(self._columns), dtype=torch.bool, device=self.device)
        out_of_play[self._place[columns]] = False
        unused = torch.where(out_of_play)[0]
        found = []
        for part in self._place[rows].split(self._rows_at_once):
            values = self._matrix.index_select(0, part)
            values.scatter_(1, part.unsqueeze(1), -torch.inf)
            values.index_fill_(1, unused, -torch.inf)
            found.append(list_largest(values, self.error))
        column, value, bound = (torch.cat(field) for field in zip(*found, strict=True))
        return Lists(self._columns[column], value, bound)

    def _leave_only(self, columns: Tensor) -> None:
        """Keep the rows and columns of these clusters in the matrix, in place."""
        places, count = self._place[columns], len(columns)
        kept = self._matrix.view(-1)[: count**2].view(count, count)
        # both in ascending order, so that a row is written after all rows before it were read
        for into, part in blocks(self._rows_at_once, kept, places):
            into.copy_(self._matrix.index_select(0, part).index_select(1, places))
        self._matrix, self._columns = kept, columns
        self._place.fill_(-1)
        self._place[columns] = torch.arange(count, device=self.device)

    def estimate(self, clusters: Tensor, others: Tensor) -> Tensor:
        """See `Clusters`."""
        place = self._place[others]
        value = self._matrix[self._place[clusters].unsqueeze(1), place.clamp(min=0)]
        return value.masked_fill_(place < 0, -torch.inf)

    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Clusters`."""
        lowest = torch.full(left.shape, torch.inf, dtype=torch.float64, device=self.device)
        size = self._size[left] * self._size[right]
        chunk = size.cumsum(0) // (4 * self._pairs_at_once)
        counts = torch.unique_consecutive(chunk, return_counts=True)[1].tolist()
        for pairs in torch.arange(len(left), device=self.device).split(counts):
            lowest[pairs] = self._similarity(left[pairs], right[pairs])
        return lowest

    def _similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """As `similarity`, for a number of token pairs that fits into memory."""
        pair, nth = _expand(self._size[left] * self._size[right])
        width = self._size[right][pair]
        one = self._member[self._first[left][pair] + nth // width]
        other = self._member[self._first[right][pair] + nth % width]
        if len(pair) > len(left):
            value = torch.cat(
                [
                    (self._rounded[some] * self._rounded[others]).sum(1)
                    for some, others in blocks(self._pairs_at_once, one, other)
                ]
            ).double()
            close = value <= _least(value, pair, len(left))[pair] + 2 * self.error
            pair, one, other = pair[close], one[close], other[close]
        exact = [
            pair_similarities(self._unit.exact(some), self._unit.exact(others))
            for some, others in blocks(self._pairs_at_once, one, other)
        ]
        return _least(torch.cat(exact), pair, len(left))

    def vectors(self, clusters: Tensor) -> tuple[Tensor, Tensor]:
        """See `Clusters`."""
        place, nth = _expand(self._size[clusters])
        return place, self._unit.exact(self._member[self._first[clusters][place] + nth])

    def merge(self, left: Tensor, right: Tensor) -> None:
        """See `Clusters`."""
        self._root[right] = left
        self._root = self._root[self._root]
        self._list_members()
        left, right = self._place[left], self._place[right]
        for some, others in blocks(self._rows_at_once, left, right):
            least = torch.minimum(self._matrix[some], self._matrix[others])
            self._matrix[some] = least
        for rows in self._matrix.split(self._rows_at_once):
            rows[:, left] = torch.minimum(rows[:, left], rows[:, right])

    def _list_members(self) -> None:
        """`_member[_first[c] : _first[c] + _size[c]]` are the tokens of cluster c."""
        self._member = torch.argsort(self._root, stable=True)
        self._size = torch.bincount(self._root, minlength=self.num_tokens)
        self._first = self._size.cumsum(0) - self._size


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """List every place as often as it counts, and its occurrences from 0, `[M] -> [T], [T]`."""
    place = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return place, torch.arange(len(place), device=counts.device) - first[place]


def _least(values: Tensor, place: Tensor, count: int) -> Tensor:
    least = values.new_full((count,), torch.inf)
    return least.scatter_reduce_(0, place, values, "amin")
