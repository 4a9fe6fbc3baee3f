"""Average linkage in fixed shape, in plain torch; see `sd_tokenmerge.kernels.average`.

A cluster is its vector sum and its size. In every round the means in play are multiplied with each
other, and the exact similarities of the few best decide. O(N C) memory and a bounded block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.device.reciprocal import Nearest, TorchRounds
from sd_tokenmerge.kernels.device.rounds import Listed, take
from sd_tokenmerge.kernels.device.search import most_similar
from sd_tokenmerge.kernels.exact import nearest_exact, pair_similarities
from sd_tokenmerge.kernels.search import float32_error

_FARTHEST = torch.iinfo(torch.int64).max


class AverageRounds(TorchRounds):
    """Clusters under average linkage.

    Args:
        unit: `[B, N, C]` float64 unit vectors; overwritten.
        num_merges: N - K, in [1, N - 1].
    """

    def __init__(self, unit: Tensor, num_merges: int) -> None:
        super().__init__(unit, num_merges)
        self._total = unit
        self._size = torch.ones_like(self.height)
        self._error = float32_error(unit.shape[2])

    def nearest_in_play(self, listed: Listed) -> Nearest:
        """See `TorchRounds`."""
        mean = take(self._total, listed.token) / take(self._size.unsqueeze(2), listed.token)
        few = most_similar(mean, self.everyone[:, : self.width], listed.valid)
        best = few.similarity.amax(2)
        others = listed.token.gather(1, few.place.flatten(1)).view(few.place.shape)
        distance = listed.token.unsqueeze(2) ^ others
        tied = torch.where(few.similarity == best.unsqueeze(2), distance, _FARTHEST)
        # rounding may bring a merged cluster nearer to a third than its parts were
        highest = torch.maximum(best, few.rest) + self._error
        return Nearest(listed.token ^ tied.amin(2), highest, few.rest < best)

    def similarity_to_nearest(self) -> Tensor:
        """See `TorchRounds`."""
        mean = self._total / self._size.unsqueeze(2)
        others = take(mean, self.nearest)
        return pair_similarities(mean.flatten(0, 1), others.flatten(0, 1)).view(self.height.shape)

    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """See `ReciprocalRounds`."""
        return pair_similarities(self._mean(left), self._mean(right))

    def combine(self, left: Tensor) -> None:
        """See `TorchRounds`."""
        others = take(self._total, self.nearest).masked_fill_(~left.unsqueeze(2), 0)
        self._total += others
        self._size += self._size.gather(1, self.nearest).masked_fill_(~left, 0)

    def prove(self, images: list[int]) -> None:
        """See `FixedRounds`."""
        in_play = self.in_play()
        for image in images:
            first = image * self.num_tokens
            rows, columns = (torch.where(part[image])[0] for part in (self.unproven, in_play))
            self.nearest[image, rows] = nearest_exact(
                self._mean(first + rows), rows, self._mean(first + columns), columns
            )
        self.unproven.zero_()

    def _mean(self, clusters: Tensor) -> Tensor:
        return self._total.flatten(0, 1)[clusters] / self._size.flatten()[clusters].unsqueeze(1)
