"""Complete linkage on cosine distance, on a matrix of similarities.

The similarity of two clusters is the smallest one between their tokens. After the first round of
merges, a float32 matrix holds it for all pairs of clusters, so that a search reads rows of it and
a merge is the minimum of two rows. The matrix takes at most 4 N^2 bytes per image: 64 MiB for 4,096
tokens, 324 MiB for 9,216.

If float32 does not decide which cluster is nearest, and for the height of every merge, the products
of the clusters' tokens are computed again, and exactly for those close to the smallest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import pair_similarities
from sd_tokenmerge.kernels.rounds import Clusters
from sd_tokenmerge.kernels.search import Lists, list_largest, mutual_lists
from sd_tokenmerge.kernels.vectors import blocks

_BLOCK_ELEMENTS = 1 << 18  # similarities looked up in one block
_WASTE = 1.2  # matrix columns per column in play above which the others are dropped


class CompleteClusters(Clusters):
    """Clusters under complete linkage; see `Clusters`."""

    def __init__(self, tokens: Tensor) -> None:
        super().__init__(tokens)
        self._root = torch.arange(len(tokens), device=tokens.device)
        self._list_members()
        self._matrix = self._rounded[:0]
        self._columns = self._root[:0]  # clusters by their places in the matrix
        self._place = torch.full_like(self._root, -1)  # of clusters in the matrix, if any

    def search(self, rows: Tensor, columns: Tensor) -> Lists:
        """See `Clusters`."""
        if len(self._matrix) == 0:
            return mutual_lists(self._rounded)
        if len(self._columns) > _WASTE * len(columns):
            self._leave_only(columns)
        is_out = torch.ones(len(self._columns), dtype=torch.bool, device=self.device)
        is_out[self._place[columns]] = False
        out_of_play = torch.where(is_out)[0]
        found = []
        for part in torch.split(self._place[rows], self._rows_at_once):
            values = self._matrix.index_select(0, part)
            values.scatter_(1, part.unsqueeze(1), -torch.inf)
            values.index_fill_(1, out_of_play, -torch.inf)
            found.append(list_largest(values, self.error))
        column, value, bound = (torch.cat(field) for field in zip(*found, strict=True))
        return Lists(self._columns[column], value, bound)

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
        for pairs in torch.split(torch.arange(len(left), device=self.device), counts):
            lowest[pairs] = self._similarity(left[pairs], right[pairs])
        return lowest

    def _similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """As `similarity`, for as many token pairs as fit into memory."""
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
        """See `Clusters`.

        Raises:
            MemoryError: the matrix cannot be allocated.
        """
        self._root[right] = left
        self._root = self._root[self._root]
        self._list_members()
        if len(self._matrix) == 0:
            self._matrix = self._build(left, right)
            return
        left, right = self._place[left], self._place[right]
        for some, others in blocks(self._rows_at_once, left, right):
            rows = (self._matrix.index_select(0, places) for places in (some, others))
            self._matrix.index_copy_(0, some, torch.minimum(*rows))
        for block in torch.split(self._matrix, self._rows_at_once):
            columns = (block.index_select(1, places) for places in (left, right))
            block.index_copy_(1, left, torch.minimum(*columns))

    def _build(self, left: Tensor, right: Tensor) -> Tensor:
        """The matrix after the first merges, which are those of tokens `left` and `right`."""
        is_single = self._size == 1
        # pairs come first, so that their rows and columns are slices
        self._enter(torch.cat((left, torch.where(is_single)[0])))
        count = len(self._columns)
        matrix = self._empty_matrix(count)
        first, second = self._rounded[self._columns], self._rounded[right]
        step = self._rows_at_once
        for start in range(0, count, step):
            # the matrix is symmetric: rows from the diagonal on, and the same as columns
            columns, partners = first[start:], second[start:]
            least = self._least_of_pairs(columns[:step], columns, partners)
            others = partners[:step]
            if len(others):
                into = least[: len(others)]
                torch.minimum(into, self._least_of_pairs(others, columns, partners), out=into)
            matrix[start : start + step, start:] = least
            matrix[start:, start : start + step] = least.T
        return matrix

    @staticmethod
    def _least_of_pairs(rows: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Similarity of tokens to clusters, which start with pairs, `[M, C] -> [M, K]` float32."""
        least = (rows @ first.T).float()
        pairs = least[:, : len(second)]
        torch.minimum(pairs, (rows @ second.T).float(), out=pairs)
        return least

    def _empty_matrix(self, count: int) -> Tensor:
        try:
            return torch.empty(count, count, dtype=torch.float32, device=self.device)
        except (MemoryError, RuntimeError) as error:  # which one depends on the device
            raise MemoryError(
                f"complete linkage of {self.num_tokens:,} tokens needs a matrix of"
                f" {4 * count**2:,} bytes on {self.device}, which cannot be allocated. Single and"
                " average linkage need none."
            ) from error

    def _leave_only(self, columns: Tensor) -> None:
        """Keep the rows and columns of these clusters in the matrix, in place."""
        places, order = self._place[columns].sort()
        columns, count = columns[order], len(columns)
        kept = self._matrix.view(-1)[: count**2].view(count, count)
        # both in ascending order, so that a row is written after all rows before it were read
        for into, part in blocks(self._rows_at_once, kept, places):
            into.copy_(self._matrix.index_select(0, part).index_select(1, places))
        self._matrix = kept
        self._enter(columns)

    def _enter(self, columns: Tensor) -> None:
        self._columns = columns
        self._place.fill_(-1)
        self._place[columns] = torch.arange(len(columns), device=self.device)

    @property
    def _rows_at_once(self) -> int:
        return max(1, _BLOCK_ELEMENTS // len(self._columns))

    def _list_members(self) -> None:
        """`_member[_first[c] : _first[c] + _size[c]]` are the tokens of cluster c."""
        self._member = torch.argsort(self._root, stable=True)
        self._size = torch.bincount(self._root, minlength=self.num_tokens)
        self._first = self._size.cumsum(0) - self._size


def _expand(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat each index by its count, and number its repetitions from 0, `[M] -> [T], [T]`."""
    place = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return place, torch.arange(len(place), device=counts.device) - first[place]


def _least(values: Tensor, place: Tensor, count: int) -> Tensor:
    least = values.new_full((count,), torch.inf)
    return least.scatter_reduce_(0, place, values, "amin")
