"""Obvious slow Fréchet distance, and covariances with a known answer."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
from torch import Tensor


def slow_frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """By matrix square roots; only for well-conditioned covariances."""
    root_a = scipy.linalg.sqrtm(cov_a.numpy())
    middle = scipy.linalg.sqrtm(root_a @ cov_b.numpy() @ root_a)
    offset = float((mean_a - mean_b).square().sum())
    return offset + float(cov_a.trace() + cov_b.trace()) - 2 * float(np.trace(middle).real)


def random_rotation(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q


def features_with(mean: Tensor, variances: Tensor, rotation: Tensor, num_images: int) -> Tensor:
    """`[N, D]` float64 features whose sample mean and covariance are exactly those given."""
    size = variances.shape[0]
    generator = torch.Generator().manual_seed(num_images)
    noise = torch.randn(num_images, size, dtype=torch.float64, generator=generator)
    white = torch.linalg.qr(noise - noise.mean(0)).Q * (num_images - 1) ** 0.5
    return white * variances.sqrt() @ rotation.T + mean
