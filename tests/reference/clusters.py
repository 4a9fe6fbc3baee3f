"""A partition drawn over a picture, pixel by pixel."""

from __future__ import annotations

from fractions import Fraction

import numpy as np


def drawn_clusters(pixels, labels):
    """Mean colours with borders, without numbers: `[H, W, 3]`, `[rows, columns]` -> `[H, W, 3]`."""
    height, width, _ = pixels.shape
    rows, columns = labels.shape
    cluster = [
        [int(labels[y * rows // height][x * columns // width]) for x in range(width)]
        for y in range(height)
    ]
    members = {}
    for y in range(height):
        for x in range(width):
            members.setdefault(cluster[y][x], []).append([int(value) for value in pixels[y][x]])
    means = {
        label: [Fraction(sum(channel), len(colours)) for channel in zip(*colours, strict=True)]
        for label, colours in members.items()
    }
    drawn = np.zeros_like(pixels)
    for y in range(height):
        for x in range(width):
            colour = means[cluster[y][x]]
            above = cluster[max(y - 1, 0)][x]
            left = cluster[y][max(x - 1, 0)]
            if above != cluster[y][x] or left != cluster[y][x]:
                is_dark = max(colour) < 64
                colour = [c + 64 if is_dark else c * Fraction(55, 100) for c in colour]
            drawn[y][x] = [round(c) for c in colour]
    return drawn
