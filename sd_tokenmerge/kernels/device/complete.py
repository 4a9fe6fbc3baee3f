"""Complete linkage in fixed shape, on one exact matrix of an image.

The similarity of two clusters is the smallest between their tokens. The matrix holds it in float64,
exactly (`sd_tokenmerge.kernels.exact`), and a merge is the element-wise minimum of two rows and of
two columns: no rounding anywhere, so every search is proven. 8 N^2 bytes and a bounded block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.device.reciprocal import Nearest, TorchRounds
from sd_tokenmerge.kernels.device.rounds import Listed, row_blocks
from sd_tokenmerge.kernels.exact import best_by_id, similarity_block


class CompleteRounds(TorchRounds):
    """The clusters of one image under complete linkage.

    Args:
        unit: `[1, N, C]` float64 unit vectors.
        num_merges: N - K, in [1, N - 1].

    Raises:
        MemoryError: the matrix does not fit; the message states its bytes.
    """

    def __init__(self, unit: Tensor, num_merges: int) -> None:
        super().__init__(unit, num_merges)
        self._matrix = allocate(self.num_tokens, unit)
        for rows in row_blocks(self.num_tokens, 4 * self.num_tokens):
            self._matrix[rows] = similarity_block(unit[0, rows], unit[0])
        self._matrix.fill_diagonal_(-torch.inf)

    def nearest_in_play(self, listed: Listed) -> Nearest:
        """See `TorchRounds`."""
        token = listed.token[0]
        found = []
        for rows in row_blocks(self.width, self.num_tokens + 4 * self.width):
            value = self._matrix.index_select(0, token[rows]).index_select(1, token)
            value.masked_fill_(~listed.valid, -torch.inf)
            found.append(best_by_id(value, token[rows], token))
        nearest = torch.cat(found)
        highest = self._matrix[token, nearest].unsqueeze(0)
        return Nearest(nearest.unsqueeze(0), highest, torch.ones_like(listed.valid))

    def similarity_to_nearest(self) -> Tensor:
        """See `TorchRounds`."""
        return self._matrix.gather(1, self.nearest.mT).mT

    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """See `ReciprocalRounds`."""
        return self._matrix[left, right]

    def combine(self, left: Tensor) -> None:
        """See `TorchRounds`."""
        partner = torch.where(left, self.nearest, self.everyone)[0]
        token = self.list_in_play().token[0]
        for rows in row_blocks(self.width, 3 * self.num_tokens):
            # in place: the higher of a pair stands in the same block or a later one
            one = self._matrix.index_select(0, token[rows])
            both = torch.minimum(one, self._matrix.index_select(0, partner[token[rows]]), out=one)
            least = torch.minimum(both, both.index_select(1, partner))
            self._matrix.index_copy_(0, token[rows], least)

    def prove(self, images: list[int]) -> None:
        """Nothing is ever unproven."""


def allocate(num_tokens: int, like: Tensor) -> Tensor:
    """An N x N matrix in float64, or an error that says what it needs."""
    try:
        return like.new_empty(num_tokens, num_tokens, dtype=torch.float64)
    except RuntimeError as error:
        raise MemoryError(
            f"complete linkage needs {8 * num_tokens**2:,} bytes for one {num_tokens} x "
            f"{num_tokens} matrix on {like.device}, which could not be allocated."
        ) from error
