"""The Fréchet distance between two sets of features, in float64.

`FD = |mu_a - mu_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)` (Heusel et al., NeurIPS 2017, eq.
6). With factors `S = F^T F`, the last trace is the nuclear norm (the sum of the singular values) of
`F_a F_b^T`. Singular values are computed to machine precision whatever the rank, while the usual
matrix square root and the eigenvalues of `S_a S_b` lose half of their digits if an eigenvalue
vanishes. `docs/fid.md` shows the measured errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gaussian:
    """A normal distribution in feature space, its covariance held as a factor.

    Attributes:
        mean: `[D]` float64.
        factor: `[R, D]` float64 with `factor.T @ factor` the covariance (divided by N - 1); R is at
            most D.
        num_images: N, or None if unknown (a foreign statistics file).
    """

    mean: Tensor
    factor: Tensor
    num_images: int | None

    @property
    def num_features(self) -> int:
        """D."""
        return self.mean.shape[0]

    @property
    def trace(self) -> float:
        """Trace of the covariance: the scale of relative errors."""
        return float(self.factor.square().sum())

    @property
    def covariance(self) -> Tensor:
        """`[D, D]` float64."""
        return self.factor.T @ self.factor

    @classmethod
    def from_features(cls, features: Tensor) -> Gaussian:
        """Fit a normal distribution to `[N, D]` features.

        Args:
            features: `[N, D]`, any float dtype, N at least 2.

        Raises:
            ValueError: the shape is not `[N, D]`, N is below 2, or a feature is not finite.
        """
        require_features(features)
        features = features.to(torch.float64)
        num_images, num_features = features.shape
        mean = features.mean(0)
        factor = (features - mean) / (num_images - 1) ** 0.5
        if num_images > num_features:
            factor = torch.linalg.qr(factor, mode="r").R
        return cls(mean, factor, num_images)

    @classmethod
    def from_statistics(cls, mean: Tensor, covariance: Tensor) -> Gaussian:
        """Wrap a mean and a covariance that were computed elsewhere, from an unknown N.

        Args:
            mean: `[D]`, any float dtype.
            covariance: `[D, D]`, symmetric up to rounding; the symmetric part is used.

        Raises:
            ValueError: shapes do not match, a value is not finite (or its square overflows), or the
                matrix is not a covariance.
        """
        mean, covariance = mean.to(torch.float64), covariance.to(torch.float64)
        size = mean.shape[0] if mean.ndim == 1 else 0
        if size == 0 or tuple(covariance.shape) != (size, size):
            raise ValueError(
                "`mean` must be [D] and `covariance` [D, D], "
                f"got {list(mean.shape)} and {list(covariance.shape)}."
            )
        largest = float(torch.stack([mean.abs().max(), covariance.abs().max()]).max())
        if not largest < 1e150:  # NaN, or its square would overflow
            raise ValueError(
                f"`mean` and `covariance` must be finite and below 1e150, got {largest:.3g}."
            )
        scale = float(covariance.abs().max())
        asymmetry = float((covariance - covariance.T).abs().max())
        if asymmetry > 1e-4 * scale:
            raise ValueError(
                f"`covariance` must be symmetric, got a difference of {asymmetry:.3g} to its "
                f"transpose at a largest entry of {scale:.3g}."
            )
        values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
        if float(values[0]) < -1e-4 * scale:
            raise ValueError(
                f"`covariance` must be positive semi-definite, got an eigenvalue of "
                f"{float(values[0]):.3g} at a largest entry of {scale:.3g}."
            )
        kept = values > values[-1] * size * torch.finfo(torch.float64).eps
        factor = (vectors[:, kept] * values[kept].sqrt()).T.contiguous()
        return cls(mean, factor, num_images=None)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Fréchet distance (squared 2-Wasserstein distance) of two normal distributions.

    Rounding can make the distance of equal sets slightly negative; it is not clamped.

    Raises:
        ValueError: the numbers of features differ.
    """
    if a.num_features != b.num_features:
        raise ValueError(
            "`a` and `b` must have the same number of features, "
            f"got {a.num_features} and {b.num_features}."
        )
    nuclear_norm = float(torch.linalg.svdvals(a.factor @ b.factor.T).sum())
    return float((a.mean - b.mean).square().sum()) + a.trace + b.trace - 2 * nuclear_norm


def require_features(*sets: Tensor) -> None:
    """Refuse features without a covariance, and sets with different numbers of features.

    Must run before any decomposition: given a NaN, `torch.linalg.eigvals` kills the process and
    SciPy's `sqrtm` never returns.

    Raises:
        ValueError: a set is not `[N, D]` with N at least 2, has a value that is not finite, or has
            another D than the first.
    """
    for features in sets:
        if features.ndim != 2 or features.shape[1] == 0:
            raise ValueError(f"Features of a set must be [N, D], got {list(features.shape)}.")
        if features.shape[0] < 2:
            raise ValueError(
                f"Features of a set must be of at least 2 images, got {features.shape[0]}: "
                "one image has no covariance."
            )
        finite = features.isfinite().all(dim=1)
        if not finite.all():
            rows = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f"Features of a set must be finite, got NaN or infinity in {len(rows)} of "
                f"{features.shape[0]} rows, the first being row {rows[0]}."
            )
        if features.shape[1] != sets[0].shape[1]:
            raise ValueError(
                "Both sets must have the same number of features, "
                f"got {sets[0].shape[1]} and {features.shape[1]}."
            )


def rank_warning(gaussian: Gaussian) -> str | None:
    """A warning if N <= D, where the distance depends strongly on N (docs/fid.md); else None."""
    n, d = gaussian.num_images, gaussian.num_features
    if n is None or n > d:
        return None
    return (
        f"{n} images are no more than the {d} features: the Fréchet distance is biased upwards "
        "and comparable only between sets of this size"
    )
