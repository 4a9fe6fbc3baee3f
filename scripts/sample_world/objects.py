"""One drawing function per class; each draws around the origin within radius 1.

Variations inside an object (spots, stripes, hands, colours) are drawn from the given
`random.Random` and repeated symmetrically, so that distant parts of a picture must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from math import cos, pi, sin
from random import Random

from sample_world.palette import BLACK, WHITE, pick, vivid
from sample_world.pen import Pen, ellipse_points, mirrored, polar, shade


def starfish(pen: Pen, rng: Random) -> None:
    """Five equal arms with a row of pale dots along each."""
    color = pick(rng, [(226, 92, 40), (203, 62, 74), (236, 148, 52), (160, 66, 130)])
    inner = rng.uniform(0.36, 0.44)
    outline = [polar(1.0 if i % 2 == 0 else inner, -pi / 2 + i * pi / 5) for i in range(10)]
    pen.polygon(outline, color)
    pen.line([*outline, outline[0]], color, 0.12)
    for arm in range(5):
        for step in range(5):
            dot = polar(0.14 + 0.17 * step, -pi / 2 + arm * 2 * pi / 5)
            pen.ellipse(dot, 0.065 - 0.006 * step, shade(color, 1.55))


def ladybug(pen: Pen, rng: Random) -> None:
    """Red wing cases with mirror-symmetric spots."""
    red = pick(rng, [(214, 34, 30), (232, 76, 22), (190, 16, 40)])
    for side in (-1, 1):
        for leg in (-0.4, 0.0, 0.4):
            pen.line([(0.4 * side, leg), (0.95 * side, leg * 1.5)], BLACK, 0.07)
        pen.line([(0.1 * side, -0.8), (0.35 * side, -1.05)], BLACK, 0.06)
    pen.ellipse((0, -0.66), (0.42, 0.32), BLACK)
    for side in (-1, 1):
        pen.ellipse((0.2 * side, -0.72), 0.1, WHITE)
    pen.ellipse((0, 0.08), (0.74, 0.8), red)
    pen.line([(0, -0.7), (0, 0.86)], BLACK, 0.06)
    rows = rng.choice([2, 3])
    for row in range(rows):
        y = -0.3 + row * 0.75 / (rows - 1)
        x = 0.36 + 0.06 * sin(3 * y)
        for side in (-1, 1):
            pen.ellipse((x * side, y), 0.15, BLACK)
    pen.ellipse((0, -0.42), (0.16, 0.14), BLACK)


def monarch(pen: Pen, rng: Random) -> None:
    """Orange wings, black veins and border with white dots, mirror-symmetric."""
    orange = pick(rng, [(240, 126, 22), (226, 96, 20), (246, 156, 40)])
    upper = [(0.05, -0.1), (0.3, -0.72), (0.95, -0.85), (0.98, -0.35), (0.6, 0.08)]
    lower = [(0.05, 0.0), (0.62, 0.1), (0.8, 0.5), (0.5, 0.9), (0.12, 0.5)]
    for wing in (upper, lower):
        for side in (wing, mirrored(wing)):
            pen.polygon(side, BLACK)
            pen.line([*side, side[0]], BLACK, 0.14)
    for wing in (upper, lower):
        cx = sum(x for x, _ in wing) / len(wing)
        cy = sum(y for _, y in wing) / len(wing)
        small = [(cx + 0.78 * (x - cx), cy + 0.78 * (y - cy)) for x, y in wing]
        for side in (small, mirrored(small)):
            pen.polygon(side, orange)
        for x, y in wing[1:4]:
            for sign in (-1, 1):
                pen.line([(0.06 * sign, 0), (0.85 * x * sign, 0.85 * y)], BLACK, 0.05)
                pen.ellipse((x * sign, y), 0.045, WHITE)
    pen.ellipse((0, 0.05), (0.09, 0.62), BLACK)
    for sign in (-1, 1):
        pen.line([(0, -0.5), (0.22 * sign, -0.92)], BLACK, 0.04)


def analog_clock(pen: Pen, rng: Random) -> None:
    """Twelve ticks and two hands on a dial."""
    rim = vivid(rng)
    pen.ellipse((0, 0), 1.0, rim)
    pen.ellipse((0, 0), 0.84, (250, 248, 240))
    for hour in range(12):
        angle = hour * pi / 6
        inner = 0.62 if hour % 3 == 0 else 0.7
        pen.line([polar(inner, angle), polar(0.76, angle)], BLACK, 0.07 if hour % 3 == 0 else 0.04)
    minutes = rng.randrange(0, 60, 5)
    hours = rng.randrange(12) + minutes / 60
    pen.line([(0, 0), polar(0.4, hours * pi / 6 - pi / 2)], BLACK, 0.1)
    pen.line([(0, 0), polar(0.64, minutes * pi / 30 - pi / 2)], BLACK, 0.06)
    pen.ellipse((0, 0), 0.08, rim)


def balloon(pen: Pen, rng: Random) -> None:
    """A hot-air balloon with gores in two or three repeating colours."""
    colors = [vivid(rng) for _ in range(rng.choice([2, 3]))]
    gores = 8
    for gore in range(gores):
        left, right = (-cos(pi * (gore + d) / gores) for d in (0, 1))
        envelope = _gore_edge(left) + _gore_edge(right)[::-1]
        pen.polygon(envelope, colors[gore % len(colors)])
    for x in (-0.16, 0.16):
        pen.line([(x, 0.55), (x * 0.8, 0.78)], BLACK, 0.03)
    pen.polygon([(-0.17, 0.76), (0.17, 0.76), (0.14, 1.0), (-0.14, 1.0)], (132, 84, 40))


def _gore_edge(side: float) -> list[tuple[float, float]]:
    """The curve from the top to the mouth of a balloon at `side` in [-1, 1] of its width."""
    points = []
    for step in range(25):
        t = step / 24
        width = 0.75 * sin(pi * min(1.0, 0.04 + 0.88 * t**0.8)) ** 0.8
        points.append((side * max(width, 0.03), -1.0 + 1.58 * t))
    return points


def umbrella(pen: Pen, rng: Random) -> None:
    """A canopy of panels in two repeating colours over a hooked handle."""
    colors = [vivid(rng), vivid(rng) if rng.random() < 0.6 else WHITE]
    pen.line([(0, -0.8), (0, 0.75)], (90, 60, 40), 0.07)
    pen.line(ellipse_points((0.14, 0.75), 0.14, start=0, stop=pi), (90, 60, 40), 0.07)
    panels = 6
    for panel in range(panels):
        left, right = (-cos(pi * (panel + d) / panels) for d in (0, 1))
        middle = ((left + right) / 2, -0.06)
        pen.polygon([*_rib(left), middle, *_rib(right)[::-1]], colors[panel % 2])
    pen.line([(0, -1.0), (0, -0.85)], (90, 60, 40), 0.05)


def _rib(side: float) -> list[tuple[float, float]]:
    """The curve from an umbrella's tip to its rim at `side` in [-1, 1] of its width."""
    angles = [pi / 2 * (step / 12) for step in range(13)]
    return [(side * sin(angle), -0.85 + 0.9 * (1 - cos(angle))) for angle in angles]


def daisy(pen: Pen, rng: Random) -> None:
    """Equal petals around a yellow disc."""
    petals = rng.choice([10, 12, 14])
    color = pick(rng, [WHITE, (250, 240, 214), (246, 214, 232)])
    for petal in range(petals):
        angle = 2 * pi * petal / petals
        pen.ellipse(polar(0.62, angle), (0.4, 2.2 / petals), shade(color, 0.8), angle)
        pen.ellipse(polar(0.62, angle), (0.37, 1.8 / petals), color, angle)
    pen.ellipse((0, 0), 0.32, (214, 150, 16))
    pen.ellipse((0, 0), 0.26, (248, 200, 36))


def banana(pen: Pen, rng: Random) -> None:
    """A crescent with a ridge and dark tips."""
    yellow = pick(rng, [(246, 214, 50), (238, 196, 36), (226, 216, 84)])
    bend = rng.uniform(0.75, 0.95)
    start, stop = 0.12 * pi, 0.88 * pi
    outer = ellipse_points((0, -0.45), (1.0, 1.05 * bend), start=start, stop=stop)
    inner = ellipse_points((0, -0.52), (0.88, 0.58 * bend), start=start, stop=stop)
    ridge = ellipse_points((0, -0.48), (0.95, 0.85 * bend), start=start, stop=stop)
    pen.polygon(outer + inner[::-1], yellow)
    pen.line(ridge, shade(yellow, 0.82), 0.05)
    for end, last in ((outer[0], inner[0]), (outer[-1], inner[-1])):
        pen.line([end, last], (96, 70, 30), 0.13)


def strawberry(pen: Pen, rng: Random) -> None:
    """A red heart-like fruit with rows of seeds under green leaves."""
    red = pick(rng, [(220, 30, 46), (236, 52, 52), (196, 18, 50)])
    outline = []
    for step in range(49):
        t = 2 * pi * step / 48
        y = -cos(t)
        outline.append((0.8 * sin(t) * (1 - 0.28 * y - 0.12 * y * y), 0.1 + 0.88 * y))
    pen.polygon(outline, red)
    for row in range(5):
        y = -0.42 + 0.27 * row
        count = 4 - abs(row - 1) if row else 3
        for seed in range(count):
            x = (seed - (count - 1) / 2) * 0.34
            pen.ellipse((x, y), (0.045, 0.07), (250, 222, 130))
    green = (58, 142, 52)
    for leaf in range(5):
        angle = -pi / 2 + (leaf - 2) * 0.62
        tip = (0.62 * cos(angle), -0.78 - 0.25 * sin(angle) - 0.12)
        pen.polygon([(-0.16, -0.78), (tip[0], tip[1] + 0.1), (0.16, -0.78)], green)
        pen.line([(0, -0.8), (tip[0], tip[1] + 0.08)], green, 0.13)
    pen.line([(0, -0.8), (0.06, -1.05)], (74, 110, 40), 0.09)


def honeycomb(pen: Pen, rng: Random) -> None:
    """Hexagonal cells, some filled, in a round comb."""
    wax = pick(rng, [(206, 142, 36), (226, 166, 46), (186, 120, 30)])
    honey = shade(wax, 0.62)
    pen.ellipse((0, 0), 1.0, shade(wax, 1.35))
    cell = 0.19
    for row in range(-4, 5):
        for column in range(-5, 6):
            x = (column + 0.5 * (row % 2)) * cell * 1.8
            y = row * cell * 1.56
            if x * x + y * y > 0.72:
                continue
            hexagon = [
                (x + cell * 0.86 * sin(i * pi / 3), y + cell * 0.86 * cos(i * pi / 3))
                for i in range(6)
            ]
            pen.polygon(hexagon, honey)


def soccer_ball(pen: Pen, rng: Random) -> None:
    """White sphere with dark pentagons joined by seams."""
    dark = pick(rng, [BLACK, (30, 36, 90), (110, 20, 30)])
    pen.ellipse((0, 0), 1.0, shade(dark, 0.6))
    pen.ellipse((0, 0), 0.95, (244, 244, 244))
    turn = rng.uniform(0, 2 * pi / 5)
    pen.polygon([polar(0.34, turn + i * 2 * pi / 5) for i in range(5)], dark)
    for i in range(5):
        angle = turn + i * 2 * pi / 5
        pen.line([polar(0.34, angle), polar(0.62, angle)], dark, 0.04)
        outer = [
            polar(0.62, angle),
            polar(0.76, angle + 0.24),
            polar(0.95, angle + 0.17),
            polar(0.95, angle - 0.17),
            polar(0.76, angle - 0.24),
        ]
        pen.polygon(outer, dark)
        middle = polar(0.72, angle + pi / 5)
        pen.line([polar(0.76, angle + 0.24), middle], dark, 0.04)
        pen.line([polar(0.76, angle + 2 * pi / 5 - 0.24), middle], dark, 0.04)


def traffic_light(pen: Pen, rng: Random) -> None:
    """Three lamps in a dark box; one is lit."""
    box = pick(rng, [(36, 38, 44), (52, 60, 40), (60, 46, 20)])
    pen.line([(0, 0.8), (0, 1.05)], shade(box, 0.7), 0.14)
    pen.polygon([(-0.44, -0.98), (0.44, -0.98), (0.44, 0.9), (-0.44, 0.9)], box)
    lit = rng.randrange(3)
    for lamp, color in enumerate([(240, 40, 34), (250, 190, 30), (40, 206, 84)]):
        y = -0.64 + 0.6 * lamp
        pen.ellipse((0, y), 0.28, shade(box, 0.5))
        pen.ellipse((0, y), 0.24, color if lamp == lit else shade(color, 0.3))


OBJECTS: dict[int, Callable[[Pen, Random], None]] = {
    301: ladybug,
    323: monarch,
    327: starfish,
    409: analog_clock,
    417: balloon,
    599: honeycomb,
    805: soccer_ball,
    879: umbrella,
    920: traffic_light,
    949: strawberry,
    954: banana,
    985: daisy,
}
"""ImageNet class index to drawing function."""
UPRIGHT = {409, 417, 879, 920}
"""Classes that keep (nearly) upright; the others are turned freely."""
