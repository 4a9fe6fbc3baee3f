"""Random tokens as the kernels meet them."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor


def white_tokens(num_tokens: int, channels: int, seed: int = 0) -> Tensor:
    """Independent normal tokens, `[N, C]` float32: no structure at all."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, channels, generator=generator)


def smooth_tokens(
    height: int, width: int, channels: int, sigma: float = 2.0, seed: int = 0
) -> Tensor:
    """A blurred normal field on a grid, `[height * width, C]` float32: neighbours are similar."""
    field = np.random.default_rng(seed).standard_normal((height, width, channels))
    blurred = gaussian_filter(field, (sigma, sigma, 0), mode="nearest")
    return torch.from_numpy(blurred.reshape(height * width, channels)).float()


def nearing_tokens(num_tokens: int) -> Tensor:
    """Each token's nearest is the next one, `[N, 2]` float64: one reciprocal pair per round."""
    angle = np.cumsum(1.3 * 0.93 ** np.arange(num_tokens))
    return torch.from_numpy(np.stack((np.cos(angle / 9), np.sin(angle / 9)), 1))
