"""The least similarities of complete linkage, computed when they are asked for.

The similarity of two clusters is the smallest one between their tokens. The products of all tokens
would be an N x N matrix, which is more than attention needs for many tokens. So the vectors are
kept instead, and the products of the clusters that are searched for are computed again, a block at
a time. As soon as so few clusters are in play that a matrix of them takes no more memory than the
tokens in float32, it takes the place of the vectors.

They are a filter, in float32 or, at half the memory and a fraction of the time, in bfloat16. The
bfloat16 numbers are then seen as integers in the same order, which the CPU compares and reduces
several times as fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.cluster_matrix import ClusterMatrix
from sd_tokenmerge.kernels.levels import Levels
from sd_tokenmerge.kernels.members import Members
from sd_tokenmerge.kernels.ranking import lowest_of
from sd_tokenmerge.kernels.search import bfloat16_error, blocks
from sd_tokenmerge.kernels.unit_rows import UnitRows

_BLOCK_ELEMENTS = 1 << 19  # similarities of tokens computed together
_ROW_ELEMENTS = 1 << 20  # similarities looked at together
_MATRIX_BYTES = 4  # of the matrix at most, for each number that the tokens have
_MINUS_INFINITY = -32641  # bfloat16's, as a key


class LeastSimilarities:
    """Similarities as keys: numbers in the same order.

    Attributes:
        error: how far a decoded key can be from the exact similarity.

    Args:
        rows: of the N tokens.
        dtype: bfloat16, or `precise_dtype`.
    """

    def __init__(self, rows: UnitRows, dtype: torch.dtype) -> None:
        self._vectors = rows.rounded(dtype)
        self._place = torch.arange(len(rows), device=self._vectors.device)
        self._coded = dtype == torch.bfloat16
        self._key_dtype = torch.int16 if self._coded else dtype
        self._matrix: ClusterMatrix | None = None
        self._most_keys = _MATRIX_BYTES * self._vectors.numel() // self._key_dtype.itemsize
        self.error = bfloat16_error(self._vectors.shape[1]) if self._coded else rows.error

    def of_tokens(self, start: int, stop: int) -> Tensor:
        """Keys of the tokens `start` to `stop` with all tokens, `[stop - start, N]`.

        Only before `look_at`. Those of tokens with themselves are the lowest.
        """
        keys = self._keys(self._vectors[start:stop])
        keys.diagonal(start).fill_(lowest_of(keys.dtype))
        return keys

    def look_at(self, columns: Tensor, members: Members) -> Tensor:
        """Say between which clusters `of_clusters` is, from now on.

        Args:
            columns: `[K]` int64, by descending size; what is left out now is never asked for again.
            members: of the clusters.

        Returns:
            `[K']` int64, what the columns of `of_clusters` are: `columns`, or these in another
            order among others.
        """
        if self._matrix is None:
            self._columns, self._members = Levels(columns, members), members
            tokens = self._columns.tokens
            self._vectors = self._vectors.index_select(0, self._place[tokens])
            self._place[tokens] = torch.arange(len(tokens), device=tokens.device)
            if len(columns) ** 2 > self._most_keys:
                return columns
            # of each block only what is kept: it is a view of a longer one
            keys = self._vectors.new_empty(len(columns), len(columns), dtype=self._key_dtype)
            for into, part in blocks(self.rows_at_once, keys, columns):
                into.copy_(self.of_clusters(part))
            self._matrix = ClusterMatrix(columns, keys, len(self._place))
            self._vectors = self._vectors[:0]
        self._matrix.look_at(columns)
        return self._matrix.columns

    def merge(self, left: Tensor, right: Tensor) -> None:
        """Follow a merge of disjoint pairs, of which the result is known by `left`."""
        if self._matrix is not None:
            self._matrix.merge(left, right)

    def of_clusters(self, clusters: Tensor) -> Tensor:
        """Keys of clusters with the columns, `[M] -> [M, K']`.

        Those with columns that have left play are the lowest; those with themselves are arbitrary.

        Args:
            clusters: some of the columns, by descending size.
        """
        if self._matrix is not None:
            return self._matrix.rows(clusters)
        keys = self._place.new_empty(len(clusters), len(self._vectors), dtype=self._key_dtype)
        done = 0
        for part in self._groups(clusters):
            keys[done : done + len(part)] = self._of_group(part)
            done += len(part)
        return self._columns.least(keys, 1)

    @property
    def rows_at_once(self) -> int:
        """Of how many clusters at once to ask for keys, so that memory is bounded."""
        return max(1, _ROW_ELEMENTS // len(self._matrix.columns if self._matrix else self._vectors))

    def decode(self, keys: Tensor) -> Tensor:
        """Similarities of keys, float64."""
        if self._coded:
            keys = keys.clamp(min=_MINUS_INFINITY)
            keys = (keys ^ ((keys >> 15) & 0x7FFF)).view(torch.bfloat16)
        return keys.double()

    def key_below(self, similarity: Tensor) -> Tensor:
        """The key of a slightly lower similarity, float64 `[M] -> [M]`."""
        if self._coded:
            bits = similarity.to(torch.bfloat16).view(torch.int16)
            return (bits ^ ((bits >> 15) & 0x7FFF)) - 1  # the conversion may have rounded up
        return similarity.to(self._key_dtype) - 2.0**-24

    def _keys(self, vectors: Tensor) -> Tensor:
        """Keys of some vectors with all that are kept, `[P, C] -> [P, P']`."""
        product = vectors @ self._vectors.T
        if self._coded:
            product = product.view(torch.int16)
            product.bitwise_xor_((product >> 15).bitwise_and_(0x7FFF))
        return product

    def _tokens_at_once(self) -> int:
        return max(1, _BLOCK_ELEMENTS // len(self._vectors))

    def _groups(self, clusters: Tensor) -> tuple[Tensor, ...]:
        """Clusters whose tokens are computed together; those with very many tokens one by one."""
        sizes = self._members.sizes[clusters]
        limit = self._tokens_at_once()
        large = int((sizes > limit).sum())
        chunk = (sizes[large:].cumsum(0) - 1) // limit
        counts = torch.unique_consecutive(chunk, return_counts=True)[1].tolist()
        return torch.split(clusters, [1] * large + counts)

    def _of_group(self, clusters: Tensor) -> Tensor:
        """Keys of clusters with the columns' tokens, `[M] -> [M, P]`."""
        if len(clusters) > 1:
            levels = Levels(clusters, self._members)
            return levels.least(self._of_rows(levels.tokens), 0)
        tokens = self._members.expand(clusters)[1]
        least, *others = torch.split(tokens, self._tokens_at_once())
        keys = self._of_rows(least).amin(0, keepdim=True)
        for part in others:
            torch.minimum(keys, self._of_rows(part).amin(0, keepdim=True), out=keys)
        return keys

    def _of_rows(self, tokens: Tensor) -> Tensor:
        return self._keys(self._vectors.index_select(0, self._place[tokens]))
