"""Unit vectors of tokens, computed when they are needed.

In float64 they take twice the memory of float32 tokens, and complete linkage looks at few of them
at a time. So only the tokens and their lengths are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import lengths, pair_similarities, unit_vectors
from sd_tokenmerge.kernels.search import blocks, float32_error

FEW_CHANNELS = 128
"""So few take little memory even in float64, and calls take longer than arithmetic."""
_BLOCK_ROWS = 512
_PAIR_ELEMENTS = 1 << 16  # of float64 vectors compared pair by pair: 512 KiB
_SAFE_LENGTH = 2.0**40  # products of so long and of so short vectors are in float32's range


class UnitRows:
    """The rows of `exact.unit_vectors`, to the last bit.

    Attributes:
        error: how far `quick_similarities` can be from the exact ones.

    Args:
        tokens: `[N, C]`, any float dtype; kept as they are. Only where they have few channels, are
            float64, or very long or short, their unit vectors are kept instead.

    Raises:
        ValueError: `tokens` are not finite.
    """

    def __init__(self, tokens: Tensor) -> None:
        self.error = float32_error(tokens.shape[1])
        self._tokens, self._length = tokens, tokens.new_ones(len(tokens), 1, dtype=torch.float64)
        keeps_unit = tokens.dtype == torch.float64 or tokens.shape[1] <= FEW_CHANNELS
        if not keeps_unit:
            for part, length in blocks(_BLOCK_ROWS, tokens, self._length):
                length.copy_(lengths(part.double()))
        is_safe = (self._length < _SAFE_LENGTH) & (self._length > 1 / _SAFE_LENGTH)
        if keeps_unit or not bool(is_safe.all()):
            self._tokens = unit_vectors(tokens)
            self._length.fill_(1)

    def __len__(self) -> int:
        """N."""
        return len(self._tokens)

    def exact(self, rows: Tensor) -> Tensor:
        """Some of them, `[M] -> [M, C]` float64."""
        exact = self._tokens.index_select(0, rows).double()
        return exact.div_(self._length.index_select(0, rows))

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """All of them, `[N, C]`."""
        vectors = self._tokens.new_empty(self._tokens.shape, dtype=dtype)
        for into, tokens, length in blocks(_BLOCK_ROWS, vectors, self._tokens, self._length):
            into.copy_(tokens.double() / length)
        return vectors

    def similarities(self, left: Tensor, right: Tensor) -> Tensor:
        """Exact similarities of pairs, `[P], [P] -> [P]` float64; see `pair_similarities`."""
        step = max(1, _PAIR_ELEMENTS // self._tokens.shape[1])
        return torch.cat(
            [
                pair_similarities(self.exact(one), self.exact(other))
                for one, other in blocks(step, left, right)
            ]
        )

    def quick_similarities(self, left: Tensor, right: Tensor) -> Tensor:
        """Similarities of pairs in float32, `[P], [P] -> [P]` float64, within `error`."""
        step = max(1, 2 * _PAIR_ELEMENTS // self._tokens.shape[1])
        found = []
        for one, other in blocks(step, left, right):
            product = self._as_float32(one) * self._as_float32(other)
            length = self._length[one] * self._length[other]
            found.append(product.sum(1).double() / length.squeeze(1))
        return torch.cat(found)

    def _as_float32(self, rows: Tensor) -> Tensor:
        return self._tokens.index_select(0, rows).float()
