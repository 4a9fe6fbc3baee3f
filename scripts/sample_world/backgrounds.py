"""Backgrounds: a gradient, or a texture that repeats across the whole picture."""

from __future__ import annotations

from random import Random

import numpy as np
from numpy.typing import NDArray

from sample_world.palette import hsv, muted


def background(rng: Random, size: int) -> NDArray[np.float32]:
    """A background, `[size, size, 3]` float32 in [0, 255]."""
    hue = rng.random()
    first = np.array(muted(rng, hue), dtype=np.float32)
    second = np.array(muted(rng, hue + rng.choice([0.0, 0.08, 0.45])), dtype=np.float32)
    if rng.random() < 0.25:
        second = np.array(hsv(hue, 0.35, 0.4), dtype=np.float32)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = rng.uniform(0, 2 * np.pi)
    u = (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)
    v = -(x - 0.5) * np.sin(angle) + (y - 0.5) * np.cos(angle)
    kind = rng.choice(["gradient", "gradient", "stripes", "checks", "dots"])
    period = rng.uniform(0.16, 0.3)
    if kind == "gradient":
        mix = np.clip(0.5 + u / 1.2, 0, 1)
    elif kind == "stripes":
        mix = _edge(np.sin(2 * np.pi * u / period), size, period)
    elif kind == "checks":
        mix = _edge(np.sin(2 * np.pi * u / period) * np.sin(2 * np.pi * v / period), size, period)
    else:
        cell_u, cell_v = (np.mod(c / period, 1) - 0.5 for c in (u, v))
        mix = _edge(0.3 - np.hypot(cell_u, cell_v), size, period * 5)
    return first + mix[..., None] * (second - first)


def _edge(level: NDArray[np.float32], size: int, period: float) -> NDArray[np.float32]:
    """A smooth step at zero about two pixels wide."""
    return np.clip(0.5 + level * size * period / 12, 0, 1)
