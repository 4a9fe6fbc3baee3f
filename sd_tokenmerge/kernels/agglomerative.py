"""Exact agglomerative clustering on cosine distance, for a batch of images.

The hierarchies of single, complete and average linkage are the ones that a textbook implementation
builds in float64, but for rounding in the last bits; they are cut by applying exactly the N - K
lowest merges. How each linkage does it, and why it is exact, is in the docstrings of `rounds`,
`average`, `complete` and `single`, and in `docs/clustering.md`. On accelerators the same rounds run
in arrays of fixed shape (`device`).

Deterministic, ties included: every comparison that decides about the result is made on values that
do not depend on the order of a sum (`exact`). The labels of an image depend on its own tokens only:
not on the other images, the batch size, the number of threads, the size of blocks, or the precision
of the search.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from sd_tokenmerge.kernels.average import AverageClusters
from sd_tokenmerge.kernels.backend import OUTSIDE_CUDA_GRAPHS, needs_fixed_shapes
from sd_tokenmerge.kernels.complete import CompleteClusters
from sd_tokenmerge.kernels.device.labels import fixed_shape_labels
from sd_tokenmerge.kernels.hierarchy import Merges
from sd_tokenmerge.kernels.images import are_small
from sd_tokenmerge.kernels.rounds import merge_rounds
from sd_tokenmerge.kernels.search import default_search_dtype
from sd_tokenmerge.kernels.single import spanning_tree

LINKAGES = ("single", "complete", "average")
_TOKENS_AT_ONCE = 1 << 14
_FEW_CHANNELS = 128  # more are enough work for one image at a time, and stay in the cache


def agglomerative_labels(
    tokens: Tensor,
    num_clusters: int,
    linkage: str,
    search_dtype: torch.dtype | None = None,
) -> Tensor:
    """Cut each image's hierarchy at K clusters, `[B, N, C] -> [B, N]` int64.

    Under `torch.compile` this is one operator. Gradients do not flow through labels.

    Args:
        tokens: `[B, N, C]`, any float dtype, finite. A zero token has cosine 0 with every token.
        num_clusters: K, in [1, N].
        linkage: `"single"`, `"complete"` or `"average"`.
        search_dtype: of the products that look for candidates, `torch.float32` or `torch.bfloat16`;
            None is the faster one on this device. It changes how many candidates need an exact
            comparison, never the labels. Only the CPU knows bfloat16.

    Returns:
        `[B, N]` int64; clusters are numbered in the order of their first tokens, 0 to K - 1.

    Raises:
        ValueError: `num_clusters` is outside [1, N], `linkage` or `search_dtype` is unknown, or
            `tokens` is not `[B, N, C]` or holds NaN or infinity.
        TypeError: `tokens` are not floating-point.
    """
    if tokens.ndim != 3 or 0 in tokens.shape[1:]:
        raise ValueError(
            f"`tokens` must be [B, N, C] with N and C of at least 1, got {list(tokens.shape)}."
        )
    if not tokens.dtype.is_floating_point:
        raise TypeError(f"`tokens` must be floating-point, got {tokens.dtype}.")
    if not 1 <= num_clusters <= tokens.shape[1]:
        raise ValueError(f"`num_clusters` must be in [1, {tokens.shape[1]}], got {num_clusters}.")
    if linkage not in LINKAGES:
        raise ValueError(f"`linkage` must be one of {', '.join(LINKAGES)}, got {linkage!r}.")
    if search_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(
            f"`search_dtype` must be torch.float32 or torch.bfloat16, got {search_dtype}."
        )
    cluster = _operator if torch.compiler.is_compiling() else _cluster
    return cluster(tokens.detach(), num_clusters, linkage, search_dtype)


def lowest_merges(
    tokens: Tensor, num_clusters: int, linkage: str, search_dtype: torch.dtype | None = None
) -> Merges:
    """The N - K lowest merges of each image's hierarchy, `[B, N, C]`; K is below N.

    Arguments and errors are those of `agglomerative_labels`, unchecked. Single and complete linkage
    take one image.
    """
    count = tokens.shape[1] - num_clusters
    dtype = search_dtype or default_search_dtype(tokens.device)
    if linkage == "complete":
        merges = merge_rounds(CompleteClusters(tokens.squeeze(0), dtype), count)
    elif linkage == "average":
        merges = merge_rounds(AverageClusters(tokens, dtype), count)
    else:
        merges = spanning_tree(tokens.squeeze(0), count, dtype)
    return merges.lowest(count, tokens.shape[1])


def _cluster(
    tokens: Tensor, num_clusters: int, linkage: str, search_dtype: torch.dtype | None
) -> Tensor:
    batch, count, channels = tokens.shape
    if num_clusters == count or batch == 0:
        return torch.arange(count, device=tokens.device).repeat(batch, 1)
    if tokens.device.type == "mps":  # knows no float64
        return _cluster(tokens.cpu(), num_clusters, linkage, search_dtype).to(tokens.device)
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        if needs_fixed_shapes(tokens):
            with suppress(MemoryError):  # of complete linkage's matrix; below, there is none
                return fixed_shape_labels(tokens, num_clusters, linkage)
        together = linkage == "average" and (are_small(count) or channels <= _FEW_CHANNELS)
        at_once = max(1, _TOKENS_AT_ONCE // count) if together else 1
        labels = []
        for images in torch.split(tokens, at_once):
            merges = lowest_merges(images, num_clusters, linkage, search_dtype)
            of_all = merges.labels(len(images) * count).view(-1, count)
            labels.append(of_all - of_all[:, :1])  # an image's clusters follow those of the last
    return torch.cat(labels)


_operator = torch.library.custom_op(
    "sd_tokenmerge::agglomerative_labels",
    _cluster,
    mutates_args=(),
    schema="(Tensor tokens, int num_clusters, str linkage, ScalarType? search_dtype) -> Tensor",
    **OUTSIDE_CUDA_GRAPHS,
)


@_operator.register_fake
def _(tokens: Tensor, num_clusters: int, linkage: str, search_dtype: torch.dtype | None) -> Tensor:
    return tokens.new_empty(tokens.shape[:2], dtype=torch.int64)
