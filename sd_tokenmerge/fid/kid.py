"""Kernel Inception Distance (Binkowski et al., ICLR 2018): unbiased, so usable for small sets.

The squared maximum mean discrepancy (MMD) with the kernel `(x.y / D + 1)^3`, estimated by the
U-statistic over all images. `subset_kid` averages over random subsets, as torchmetrics and
torch-fidelity do.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sd_tokenmerge.fid.distance import require_features
from sd_tokenmerge.fid.jackknife import Groups

_BLOCK = 1024


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """`(x.y / D + 1)^3`, `[N, D]` and `[M, D]` to `[N, M]`."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def self_similarity(features: Tensor) -> float:
    """Mean kernel over all pairs of different images of one set.

    Raises:
        ValueError: as `require_features`.
    """
    require_features(features)
    features = features.to(torch.float64)
    count = features.shape[0]
    total = _kernel_sum(features, features)
    return (total - float(_diagonal(features).sum())) / (count * (count - 1))


def kernel_distance(
    features: Tensor, reference: Tensor, *, reference_similarity: float | None = None
) -> float:
    """Unbiased KID of all images.

    Args:
        features: `[N, D]`, any float dtype.
        reference: `[M, D]`.
        reference_similarity: `self_similarity(reference)`, if already known.

    Returns:
        The squared MMD. Zero on average for two sets of one population, so often negative.

    Raises:
        ValueError: as `require_features`.
    """
    require_features(features, reference)
    if reference_similarity is None:
        reference_similarity = self_similarity(reference)
    features, reference = features.to(torch.float64), reference.to(torch.float64)
    mean_cross = _kernel_sum(features, reference) / (features.shape[0] * reference.shape[0])
    return self_similarity(features) + reference_similarity - 2 * mean_cross


def kernel_replicates(
    features: Tensor, reference: Tensor, groups: Groups, *, reference_similarity: float
) -> Tensor:
    """KIDs with groups of images deleted, `[2G]` float64 in the order of `Groups.deleted`."""
    require_features(features, reference)
    features, reference = features.to(torch.float64), reference.to(torch.float64)
    member = torch.nn.functional.one_hot(groups.labels, groups.num_groups).to(
        torch.float64
    )  # [N, G]
    within = torch.zeros(groups.num_groups, groups.num_groups, dtype=torch.float64)
    cross = torch.zeros(groups.num_groups, dtype=torch.float64)
    for start in range(0, features.shape[0], _BLOCK):
        block, block_member = features[start : start + _BLOCK], member[start : start + _BLOCK]
        within += block_member.T @ polynomial_kernel(block, features) @ member
        cross += block_member.T @ polynomial_kernel(block, reference).sum(1)
    within -= torch.diag(member.T @ _diagonal(features))
    kept = (~groups.deleted).to(torch.float64)  # [2G, G]
    count = kept @ member.sum(0)
    pairs = ((kept @ within) * kept).sum(1)
    mean_cross = kept @ cross / (count * reference.shape[0])
    return pairs / (count * (count - 1)) + reference_similarity - 2 * mean_cross


class SubsetKID(NamedTuple):
    """Mean and standard deviation over random subsets."""

    mean: float
    std: float


def subset_kid(
    features: Tensor,
    reference: Tensor,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> SubsetKID:
    """KID as other packages print it: averaged over random subsets drawn without replacement.

    The standard deviation is that of single subsets, not the uncertainty of the mean.

    Args:
        features: `[N, D]`, any float dtype.
        reference: `[M, D]`.
        num_subsets: number of subsets.
        subset_size: images per subset, of each set; at most N and M.
        seed: of a private generator.

    Raises:
        ValueError: a subset would be larger than a set, or as `require_features`.
    """
    require_features(features, reference)
    smallest = min(features.shape[0], reference.shape[0])
    if not 2 <= subset_size <= smallest:
        raise ValueError(f"`subset_size` must be in [2, {smallest}], got {subset_size}.")
    if num_subsets < 1:
        raise ValueError(f"`num_subsets` must be at least 1, got {num_subsets}.")
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(
        [
            kernel_distance(
                features[torch.randperm(features.shape[0], generator=generator)[:subset_size]],
                reference[torch.randperm(reference.shape[0], generator=generator)[:subset_size]],
            )
            for _ in range(num_subsets)
        ],
        dtype=torch.float64,
    )
    return SubsetKID(float(values.mean()), float(values.std(correction=0)))


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    return sum(
        float(polynomial_kernel(x[start : start + _BLOCK], y).sum())
        for start in range(0, x.shape[0], _BLOCK)
    )


def _diagonal(features: Tensor) -> Tensor:
    return (features.square().sum(1) / features.shape[1] + 1) ** 3
