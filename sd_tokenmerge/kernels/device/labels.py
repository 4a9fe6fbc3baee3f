"""Which rounds of fixed shape cluster which linkage."""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.backend import runs_triton
from sd_tokenmerge.kernels.device.average import AverageRounds
from sd_tokenmerge.kernels.device.complete import CompleteRounds
from sd_tokenmerge.kernels.device.rounds import labels_by_rounds
from sd_tokenmerge.kernels.device.single import SingleRounds
from sd_tokenmerge.kernels.exact import unit_vectors


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
    num_merges = tokens.shape[1] - num_clusters
    unit = unit_vectors(tokens.flatten(0, 1)).view(tokens.shape)
    if linkage == "complete":
        return torch.cat([labels_by_rounds(CompleteRounds(image, num_merges)) for image in unit])
    if linkage == "single":
        return labels_by_rounds(SingleRounds(unit, num_merges))
    if runs_triton(tokens):
        from sd_tokenmerge.kernels.device.triton_average import TritonAverageRounds

        return labels_by_rounds(TritonAverageRounds(unit, num_merges))
    return labels_by_rounds(AverageRounds(unit, num_merges))
