"""The resizing rules of the protocols, spelled out."""

from __future__ import annotations

from math import ceil, floor

import numpy as np
from PIL import Image


def clean_rule(image: Image.Image, size: int) -> np.ndarray:
    """clean-fid's "clean" rule: each channel as a float image through Pillow's bicubic filter."""
    pixels = np.array(image)
    resized = [
        Image.fromarray(pixels[:, :, channel].astype(np.float32)).resize(
            (size, size), resample=Image.Resampling.BICUBIC
        )
        for channel in range(3)
    ]
    return np.clip(np.stack([np.asarray(channel) for channel in resized]), 0, 255)


def bicubic(x: float) -> float:
    """Keys' cubic kernel with a = -0.5."""
    a, x = -0.5, abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    if x < 2:
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return 0.0


def triangle(x: float) -> float:
    return max(0.0, 1 - abs(x))


def resize_axis(values: np.ndarray, size: int, kernel, support: float, stretch: bool) -> np.ndarray:
    """Resample the last axis; `stretch` widens the kernel when shrinking (antialiasing)."""
    length = values.shape[-1]
    step = length / size
    width = max(step, 1.0) if stretch else 1.0
    output = np.empty((*values.shape[:-1], size))
    for target in range(size):
        centre = (target + 0.5) * step
        if stretch:
            low = max(floor(centre - support * width + 0.5), 0)
            high = min(floor(centre + support * width + 0.5), length)
            places = list(range(low, high))
        else:
            places = list(range(floor(centre - 0.5), ceil(centre - 0.5 + 1e-12) + 1))
        weights = np.array([kernel((place + 0.5 - centre) / width) for place in places])
        inside = np.clip(places, 0, length - 1)
        output[..., target] = (values[..., inside] * (weights / weights.sum())).sum(-1)
    return output


def resize(image: Image.Image, size: int, kernel, support: float, *, stretch: bool) -> np.ndarray:
    """`[3, size, size]` float64, not clipped."""
    pixels = np.array(image).transpose(2, 0, 1).astype(np.float64)
    across = resize_axis(pixels, size, kernel, support, stretch)
    down = resize_axis(across.swapaxes(1, 2), size, kernel, support, stretch)
    return down.swapaxes(1, 2)
