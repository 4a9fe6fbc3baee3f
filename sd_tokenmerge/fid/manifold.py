"""Fidelity and diversity, separately: precision, recall, density and coverage.

A set's manifold is the union of balls around its images, each reaching to the image's k-th nearest
neighbour in the same set. Precision and recall: Kynkaanniemi et al. (NeurIPS 2019), k = 3. Density
and coverage: Naeem et al. (ICML 2020), k = 5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sd_tokenmerge.fid.distance import require_features

K_PRECISION, K_DENSITY = 3, 5
_BLOCK = 512


@dataclass(frozen=True)
class Manifold:
    """Overlap of the generated with the reference manifold.

    Attributes:
        precision: share of the generated images inside the reference manifold, in [0, 1].
        recall: share of the reference images inside the generated manifold, in [0, 1].
        density: mean number of reference balls around a generated image, over k; may exceed 1.
        coverage: share of the reference balls that hold a generated image, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


def compare_manifolds(
    generated: Tensor,
    reference: Tensor,
    *,
    k_precision: int = K_PRECISION,
    k_density: int = K_DENSITY,
) -> Manifold:
    """Compute all four numbers.

    Args:
        generated: `[N, D]` features, any float dtype.
        reference: `[M, D]`.
        k_precision: neighbours for precision and recall.
        k_density: neighbours for density and coverage.

    Raises:
        ValueError: as `require_features`, or a set has no more than k images.
    """
    require_features(generated, reference)
    smallest = min(generated.shape[0], reference.shape[0])
    largest_k = max(k_precision, k_density)
    if min(k_precision, k_density) < 1 or largest_k >= smallest:
        raise ValueError(
            f"`k_precision` and `k_density` must be in [1, {smallest - 1}] for sets of "
            f"{generated.shape[0]} and {reference.shape[0]} images, "
            f"got {k_precision} and {k_density}."
        )
    generated, reference = generated.to(torch.float64), reference.to(torch.float64)
    reference_radii = neighbour_distances(reference, largest_k)
    generated_radii = neighbour_distances(generated, k_precision)[:, k_precision - 1]
    wide, dense = reference_radii[:, k_precision - 1], reference_radii[:, k_density - 1]
    precise, balls = 0, 0
    recalled = torch.zeros(reference.shape[0], dtype=torch.bool)
    covered = torch.zeros(reference.shape[0], dtype=torch.bool)
    for start in range(0, generated.shape[0], _BLOCK):
        block = generated[start : start + _BLOCK]
        radii = generated_radii[start : start + _BLOCK]
        distances = torch.cdist(block, reference)
        precise += int((distances <= wide).any(1).sum())
        recalled |= (distances <= radii[:, None]).any(0)
        inside = distances <= dense
        balls += int(inside.sum())
        covered |= inside.any(0)
    count = generated.shape[0]
    return Manifold(
        precision=precise / count,
        recall=float(recalled.double().mean()),
        density=balls / (k_density * count),
        coverage=float(covered.double().mean()),
    )


def neighbour_distances(features: Tensor, k: int) -> Tensor:
    """Distances to the k nearest other images, ascending, `[N, D] -> [N, k]`."""
    nearest = []
    for start in range(0, features.shape[0], _BLOCK):
        distances = torch.cdist(features[start : start + _BLOCK], features)
        own = torch.arange(distances.shape[0])
        distances[own, own + start] = torch.inf
        nearest.append(distances.topk(k, largest=False).values)
    return torch.cat(nearest)
