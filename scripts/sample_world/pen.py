"""Drawing in an object's own coordinates: origin at its centre, radius about 1, y pointing down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import cos, pi, sin

from PIL import ImageDraw

Point = tuple[float, float]
Color = tuple[int, int, int]


class Pen:
    """Maps unit coordinates to pixels by a rotation, a scale, a squeeze and a shift."""

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        center: Point,
        radius: float,
        angle: float = 0.0,
        squeeze: float = 1.0,
    ) -> None:
        self.draw, self.center, self.radius = draw, center, radius
        self.angle, self.squeeze = angle, squeeze

    def pixel(self, point: Point) -> Point:
        """Pixel coordinates of a point in unit coordinates."""
        x, y = point[0] * self.squeeze, point[1]
        turned = (
            x * cos(self.angle) - y * sin(self.angle),
            x * sin(self.angle) + y * cos(self.angle),
        )
        return (
            self.center[0] + self.radius * turned[0],
            self.center[1] + self.radius * turned[1],
        )

    def polygon(self, points: Iterable[Point], fill: Color) -> None:
        """Fill a polygon."""
        self.draw.polygon([self.pixel(p) for p in points], fill=fill)

    def line(self, points: Iterable[Point], fill: Color, width: float) -> None:
        """Draw a polyline with round joints; `width` in unit coordinates."""
        pixels = max(1, round(width * self.radius))
        path = [self.pixel(p) for p in points]
        self.draw.line(path, fill=fill, width=pixels, joint="curve")
        for x, y in path:
            half = pixels / 2
            self.draw.ellipse((x - half, y - half, x + half, y + half), fill=fill)

    def ellipse(self, center: Point, radii: Point | float, fill: Color, angle: float = 0.0) -> None:
        """Fill an ellipse with half-axes `radii`, turned by `angle` within the object."""
        self.polygon(ellipse_points(center, radii, angle), fill)


def ellipse_points(
    center: Point,
    radii: Point | float,
    angle: float = 0.0,
    start: float = 0.0,
    stop: float = 2 * pi,
) -> list[Point]:
    """Points on an elliptic arc."""
    a, b = radii if isinstance(radii, tuple) else (radii, radii)
    steps = 48
    points = []
    for step in range(steps + 1):
        t = start + (stop - start) * step / steps
        x, y = a * cos(t), b * sin(t)
        points.append(
            (
                center[0] + x * cos(angle) - y * sin(angle),
                center[1] + x * sin(angle) + y * cos(angle),
            )
        )
    return points


def polar(radius: float, angle: float) -> Point:
    """The point at `angle` (radians, 0 to the right, growing downwards) on a circle."""
    return (radius * cos(angle), radius * sin(angle))


def mirrored(points: Sequence[Point]) -> list[Point]:
    """The points reflected at the vertical axis."""
    return [(-x, y) for x, y in points]


def shade(color: Color, factor: float) -> Color:
    """The colour darkened (`factor` < 1) or lightened towards white (> 1)."""
    if factor <= 1:
        return tuple(round(c * factor) for c in color)  # type: ignore[return-value]
    return tuple(round(c + (255 - c) * (factor - 1)) for c in color)  # type: ignore[return-value]
