"""Exact agglomerative clustering on cosine distance.

The hierarchies of single, complete and average linkage are those that a textbook implementation
builds in float64, up to rounding in the last bits; they are cut by applying exactly the N - K
lowest merges. The docstrings of `rounds`, `average`, `complete` and `single`, and
`docs/clustering.md`, explain how each linkage works and why it is exact.

Deterministic, ties included: every comparison that decides the result uses values that do not
depend on the order of a sum (`exact`). The labels of an image depend on its own tokens only:
not on the other images, the batch size, the number of threads, the size of blocks, or the precision
of the search. On another device, labels can differ where heights differ by rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.average import AverageClusters
from sd_tokenmerge.kernels.complete import CompleteClusters
from sd_tokenmerge.kernels.hierarchy import Merges
from sd_tokenmerge.kernels.rounds import merge_rounds
from sd_tokenmerge.kernels.single import spanning_tree

LINKAGES = ("single", "complete", "average")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def agglomerative_labels(tokens: Tensor, num_clusters: int, linkage: str) -> Tensor:
    """Cut each image's hierarchy at K clusters, `[B, N, C] -> [B, N]` int64.

    Images are clustered one after the other. Beside the tokens, single and average linkage take
    O(N C) memory, complete linkage a float32 matrix of 4 N^2 bytes. `torch.compile` breaks its
    graph here. Gradients do not flow through labels.

    Args:
        tokens: `[B, N, C]`, any float dtype, finite. A zero token has cosine 0 with every token.
        num_clusters: K, in [1, N].
        linkage: `"single"`, `"complete"` or `"average"`.

    Returns:
        `[B, N]` int64; clusters are numbered in the order of their first tokens, 0 to K - 1.

    Raises:
        ValueError: `num_clusters` is outside [1, N], `linkage` is unknown, or `tokens` is not
            `[B, N, C]` or holds NaN or infinity.
        TypeError: `tokens` are not floating-point.
        MemoryError: complete linkage's matrix cannot be allocated.
    """
    if tokens.ndim != 3 or 0 in tokens.shape[1:]:
        raise ValueError(
            f"`tokens` must be [B, N, C] with N and C of at least 1, got {list(tokens.shape)}."
        )
    if not tokens.dtype.is_floating_point:
        raise TypeError(f"`tokens` must be floating-point, got {tokens.dtype}.")
    batch, count, _ = tokens.shape
    if not 1 <= num_clusters <= count:
        raise ValueError(f"`num_clusters` must be in [1, {count}], got {num_clusters}.")
    if linkage not in LINKAGES:
        raise ValueError(f"`linkage` must be one of {', '.join(LINKAGES)}, got {linkage!r}.")
    if num_clusters == count or batch == 0:
        return torch.arange(count, device=tokens.device).repeat(batch, 1)
    if tokens.device.type == "mps":  # has no float64
        labels: Tensor = agglomerative_labels(tokens.cpu(), num_clusters, linkage)
        return labels.to(tokens.device)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        merges = [lowest_merges(image, num_clusters, linkage) for image in tokens]
        return torch.stack([image.labels(count) for image in merges])


def lowest_merges(tokens: Tensor, num_clusters: int, linkage: str) -> Merges:
    """The N - K lowest merges of one image's hierarchy, `[N, C]`; K is below N.

    Arguments and errors are those of `agglomerative_labels`, unchecked.
    """
    count = len(tokens) - num_clusters
    if linkage == "single":
        return spanning_tree(tokens, count).lowest(count)
    clusters = AverageClusters(tokens) if linkage == "average" else CompleteClusters(tokens)
    return merge_rounds(clusters, count).lowest(count)
