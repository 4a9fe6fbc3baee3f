"""The colours of the world."""

from __future__ import annotations

from colorsys import hsv_to_rgb
from random import Random

from sample_world.pen import Color

BLACK: Color = (24, 22, 26)
WHITE: Color = (248, 248, 246)


def pick(rng: Random, colors: list[Color]) -> Color:
    """One of the colours, with a small jitter."""
    return tuple(min(255, max(0, c + rng.randint(-8, 8))) for c in rng.choice(colors))  # type: ignore[return-value]


def hsv(hue: float, saturation: float, value: float) -> Color:
    """An RGB colour from hue, saturation and value in [0, 1] (the hue wraps)."""
    return tuple(round(255 * c) for c in hsv_to_rgb(hue % 1, saturation, value))  # type: ignore[return-value]


def vivid(rng: Random) -> Color:
    """A saturated colour of any hue."""
    return hsv(rng.random(), rng.uniform(0.7, 0.9), rng.uniform(0.75, 0.95))


def muted(rng: Random, hue: float) -> Color:
    """A pale colour near `hue`, for backgrounds."""
    return hsv(hue + rng.uniform(-0.03, 0.03), rng.uniform(0.15, 0.4), rng.uniform(0.65, 0.92))
