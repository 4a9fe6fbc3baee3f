"""The matrix of complete linkage: the least similarity between each cluster and each token.

Row I holds, for every token t, the smallest similarity between t and the members of cluster I. A
merge is the element-wise minimum of two rows; columns are never rewritten.

The matrix is a filter, either in float32 (4 N^2 bytes) or, at half the memory and a fraction of the
time, in bfloat16. The bfloat16 numbers are stored as integers in the same order, which the CPU
compares and reduces several times as fast.

Nothing else is nearly as large: at 4,096 tokens of 320 channels the bfloat16 matrix takes 32 MiB,
and everything else held beside the tokens 6. Unmerged attention takes 50 MiB for two such images,
but grows with N, so from a few hundred tokens more on complete linkage takes more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.members import Members
from sd_tokenmerge.kernels.ranking import lowest_of
from sd_tokenmerge.kernels.search import bfloat16_error, blocks
from sd_tokenmerge.kernels.unit_rows import UnitRows

_BLOCK_ROWS = 128
_LEVELS = 32
_MINUS_INFINITY = -32641  # bfloat16's, as a key


class LeastSimilarities:
    """An `[N, N]` matrix of keys: numbers in the order of the similarities.

    Attributes:
        error: how far a decoded key can be from the exact similarity.

    Args:
        rows: of the N tokens.
        dtype: bfloat16, or `precise_dtype`.

    Raises:
        MemoryError: the matrix does not fit; the message states its bytes.
    """

    def __init__(self, rows: UnitRows, dtype: torch.dtype) -> None:
        self._vectors = rows.rounded(dtype)
        self._coded = dtype == torch.bfloat16
        self.error = bfloat16_error(self._vectors.shape[1]) if self._coded else rows.error
        self._keys = allocate(len(rows), self._vectors, torch.int16 if self._coded else dtype)

    def fill(self, start: int, stop: int) -> Tensor:
        """Compute the rows `start` to `stop`, a view `[stop - start, N]`."""
        block = self._keys[start:stop]
        product = block.view(self._vectors.dtype)
        torch.mm(self._vectors[start:stop], self._vectors.T, out=product)
        if self._coded:
            for part in torch.split(block, _BLOCK_ROWS):
                part.bitwise_xor_((part >> 15).bitwise_and_(0x7FFF))
        block.diagonal(start).fill_(lowest_of(block.dtype))  # one's own is never used
        return block

    def is_filled(self) -> None:
        """Give back the memory that only `fill` needs."""
        del self._vectors

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
        return similarity.to(self._keys.dtype) - 2.0**-24

    def merge(self, left: Tensor, right: Tensor) -> None:
        """Make the rows `left` those of the merged clusters."""
        for one, other in blocks(_BLOCK_ROWS, left, right):
            least = self._keys.index_select(0, one)
            torch.minimum(least, self._keys.index_select(0, other), out=least)
            self._keys.index_copy_(0, one, least)

    def between(self, clusters: Tensor, tokens: Tensor) -> Tensor:
        """Similarities of pairs of a cluster and a token, `[P], [P] -> [P]` float64."""
        return self.decode(self._keys[clusters, tokens])

    def by_cluster(self, clusters: Tensor, columns: Tensor, members: Members) -> Tensor:
        """Keys between clusters, `[M], [K] -> [M, K]`; `columns` by descending size."""
        least = self._keys.new_empty(len(clusters), len(columns))
        for into, part in blocks(_BLOCK_ROWS, least, clusters):
            into.copy_(least_by_cluster(self._keys.index_select(0, part), columns, members))
        return least


def least_by_cluster(values: Tensor, columns: Tensor, members: Members) -> Tensor:
    """Minimum over each cluster's tokens, `[M, N], [K] -> [M, K]`; `columns` by descending size."""
    sizes = members.sizes[columns]
    levels = torch.arange(_LEVELS + 1, device=sizes.device).unsqueeze(1)
    larger = (sizes > levels).sum(1).tolist()
    least = _columns(values, members.nth(columns, 0))
    for level in range(1, _LEVELS):
        if not (count := larger[level]):
            break
        tokens = members.nth(columns[:count], level)
        torch.minimum(least[:, :count], _columns(values, tokens), out=least[:, :count])
    for place in range(larger[_LEVELS]):
        tokens = members.expand(columns[place : place + 1])[1]
        least[:, place] = _columns(values, tokens).amin(1)
    return least


def _columns(values: Tensor, tokens: Tensor) -> Tensor:
    # of integers, `index_select` takes three times as long
    return values.gather(1, tokens.expand(len(values), -1))


def allocate(num_tokens: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """An N x N matrix, or an error that says what it needs."""
    try:
        return like.new_empty(num_tokens, num_tokens, dtype=dtype)
    except RuntimeError as error:
        needed = num_tokens**2 * dtype.itemsize
        raise MemoryError(
            f"complete linkage needs {needed:,} bytes for one {num_tokens} x {num_tokens} matrix "
            f"on {like.device}, which could not be allocated. Average linkage needs no such matrix."
        ) from error
