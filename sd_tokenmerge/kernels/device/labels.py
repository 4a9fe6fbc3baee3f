"""Which rounds of fixed shape cluster which linkage."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sd_tokenmerge.kernels.backend import runs_triton
from sd_tokenmerge.kernels.device.average import AverageRounds
from sd_tokenmerge.kernels.device.complete import CompleteRounds
from sd_tokenmerge.kernels.device.rounds import FixedRounds, labels_by_rounds
from sd_tokenmerge.kernels.device.single import SingleRounds
from sd_tokenmerge.kernels.exact import unit_vectors

ROUNDS: dict[str, Callable[[Tensor, int], FixedRounds]] = {
    "single": SingleRounds,
    "complete": CompleteRounds,
    "average": AverageRounds,
}
_NUMBERS_AT_ONCE = 1 << 23  # of the images that go through the rounds together


def fixed_shape_labels(tokens: Tensor, num_clusters: int, linkage: str) -> Tensor:
    """Cut each image's hierarchy at K clusters, `[B, N, C] -> [B, N]` int64.

    Args:
        tokens: `[B, N, C]`, any float dtype, B and N of at least 1.
        num_clusters: K, in [1, N - 1].
        linkage: `"single"`, `"complete"` or `"average"`.

    Raises:
        ValueError: `tokens` are not finite.
        MemoryError: complete linkage's matrix, 8 N^2 bytes, does not fit.
    """
    rounds = ROUNDS[linkage]
    if linkage == "average" and runs_triton(tokens):
        from sd_tokenmerge.kernels.device.triton_average import TritonAverageRounds

        rounds = TritonAverageRounds
    unit = unit_vectors(tokens.flatten(0, 1)).view(tokens.shape)
    at_once = 1 if linkage == "complete" else max(1, _NUMBERS_AT_ONCE // unit[0].numel())
    num_merges = tokens.shape[1] - num_clusters
    return torch.cat(
        [labels_by_rounds(rounds(images, num_merges)) for images in torch.split(unit, at_once)]
    )
