"""Average linkage in fixed shape through Triton's kernels, for CUDA.

The product is reduced to the two largest values of each row before it leaves the chip. Each cluster
keeps its nearest and a bound on the rest, so that only rows which these no longer prove are
searched; they and the columns in play are lists with a count that stays on the device. Rows that
the product does not prove are compared exactly by the kernels themselves: nothing waits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sd_tokenmerge.kernels.device import triton_kernels as kernels
from sd_tokenmerge.kernels.device.reciprocal import ReciprocalRounds
from sd_tokenmerge.kernels.device.rounds import list_tokens
from sd_tokenmerge.kernels.exact import low_bits, pair_similarities

_BLOCK_CHANNELS = 64
_BLOCK_TOKENS = 64


class TritonAverageRounds(ReciprocalRounds):
    """Clusters under average linkage.

    Attributes:
        total: `[B, N, C]` float64 sum of the unit tokens.
        size: `[B, N]` float64 number of tokens.
        mean: `[B, N, C]` float32.
        best: `[B, N]` float64 similarity to the nearest when it was found, within `error`.
        rest: `[B, N]` float64; no other is more similar than this plus `error`.
        error: of a float32 product.

    Args:
        unit: `[B, N, C]` float64 unit vectors, on a CUDA device, or on the CPU under Triton's
            interpreter; overwritten.
        num_merges: N - K, in [1, N - 1].
    """

    def __init__(self, unit: Tensor, num_merges: int) -> None:
        super().__init__(unit, num_merges)
        self.total = unit.contiguous()
        self.size = torch.ones_like(self.height)
        self.mean = self.total.float()
        self.best = torch.zeros_like(self.height)
        self.rest = torch.zeros_like(self.height)
        self.error = product_error(unit.shape[2])

    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """See `ReciprocalRounds`."""
        total, size = self.total.flatten(0, 1), self.size.flatten()
        one, other = (total[part] / size[part].unsqueeze(1) for part in (left, right))
        return pair_similarities(one, other)

    def merge(self, this_round: int) -> None:
        """See `FixedRounds`."""
        self.is_new.zero_()
        self._launch(
            kernels.merge_pairs,
            self.num_tokens,
            this_round=this_round,
            LOW_MAGIC=self._low_magic,
            BLOCK_C=_BLOCK_CHANNELS,
        )
        self.moved = self.is_new.any(1)
        self.lower_bound()

    def search(self) -> None:
        """See `FixedRounds`."""
        search = torch.empty_like(self.alive)
        self._launch(kernels.refresh, self.num_tokens, search=search, BLOCK_C=_BLOCK_CHANNELS)
        self.find_nearest(search)

    def find_nearest(self, search: Tensor) -> None:
        """Find the nearest in play of the clusters flagged, `[B, N]` bool."""
        rows, row_count = list_tokens(search)
        columns, column_count = list_tokens(self.in_play())
        lists = {
            "rows": rows,
            "row_count": row_count,
            "columns": columns,
            "column_count": column_count,
        }
        self._launch(
            kernels.find_nearest,
            triton.cdiv(self.num_tokens, _BLOCK_TOKENS),
            **lists,
            PRECISION="tf32x3" if torch.version.cuda else "ieee",
            BLOCK_M=_BLOCK_TOKENS,
            BLOCK_N=_BLOCK_TOKENS,
            BLOCK_C=32,
        )
        self._launch(
            kernels.resolve,
            self.num_tokens,
            **lists,
            LOW_MAGIC=self._low_magic,
            BLOCK_N=16,
            BLOCK_C=_BLOCK_CHANNELS,
        )

    def prove(self, images: list[int]) -> None:
        """Nothing is ever unproven."""

    @property
    def _low_magic(self) -> float:
        return 1.5 * 2.0 ** (52 - low_bits(self.mean.shape[2]))

    def _launch(self, kernel: Any, programs: int, **given: Any) -> None:
        """Run so many programs per image; arguments not given are the attributes of that name."""
        given |= {"N": self.num_tokens, "C": self.mean.shape[2]}
        missing = [name for name in kernel.arg_names if name not in given]
        arguments = given | {name: getattr(self, name) for name in missing}
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                assert value.is_contiguous(), name
                arguments[name] = value.view(torch.int8) if value.dtype == torch.bool else value
        kernel[(programs, self.batch)](**arguments, enable_fp_fusion=False)


def product_error(channels: int) -> float:
    """How far a product of the search can be off: float32 from three TF32 products, or IEEE.

    Each factor keeps 22 bits; C roundings of the sum, and some to spare.
    """
    return (channels + 32) * 2.0**-22
