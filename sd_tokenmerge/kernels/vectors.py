"""Unit vectors of tokens, computed when they are needed.

In float64 they take twice the memory of float32 tokens, and a decision looks at few of them at a
time. So only the tokens and their lengths are kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import lengths

_BLOCK_ROWS = 512


class UnitVectors:
    """The rows of `exact.unit_vectors`, to the last bit.

    Args:
        tokens: `[N, C]`, any float dtype; kept, not copied.

    Raises:
        ValueError: `tokens` are not finite.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self._largest: Tensor | None = None
        if tokens.dtype == torch.float64:  # squares of narrower floats cannot overflow in float64
            largest = tokens.abs().amax(1, keepdim=True)
            self._largest = torch.where(largest > 0, largest, 1.0)
        self._length = tokens.new_ones(len(tokens), 1, dtype=torch.float64)
        for rows in torch.split(torch.arange(len(tokens), device=tokens.device), _BLOCK_ROWS):
            self._length[rows] = lengths(self.exact(rows))

    def __len__(self) -> int:
        """N."""
        return len(self._tokens)

    def exact(self, rows: Tensor) -> Tensor:
        """The given rows, `[M] -> [M, C]` float64."""
        vectors = self._tokens.index_select(0, rows).double()
        if self._largest is not None:
            vectors = vectors.div_(self._largest[rows])
        return vectors.div_(self._length[rows])

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """All rows, `[N, C]` in `dtype`."""
        vectors = self._tokens.new_empty(self._tokens.shape, dtype=dtype)
        for rows in torch.split(torch.arange(len(self), device=vectors.device), _BLOCK_ROWS):
            vectors[rows] = self.exact(rows).to(dtype)
        return vectors


def blocks(size: int, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of at most `size` rows from equally long tensors."""
    return zip(*(torch.split(part, size) for part in values), strict=True)
