"""One picture of the world, as a pure function of class and seed."""

from __future__ import annotations

from math import pi
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sample_world.backgrounds import background
from sample_world.objects import OBJECTS, UPRIGHT
from sample_world.pen import Pen

SUPERSAMPLING = 2


def render(class_index: int, seed: int, size: int = 256) -> Image.Image:
    """Draw one picture.

    Args:
        class_index: an ImageNet class index of `OBJECTS`.
        seed: any integer; pictures of one seed differ between classes.
        size: side in pixels.

    Raises:
        ValueError: the class is not part of the world.
    """
    if class_index not in OBJECTS:
        raise ValueError(f"`class_index` must be one of {sorted(OBJECTS)}, got {class_index}.")
    rng = Random(seed * 1009 + class_index)
    fine = size * SUPERSAMPLING
    radius = fine * rng.uniform(0.26, 0.4)
    slack = fine / 2 - radius * 1.08
    center = tuple(fine / 2 + rng.uniform(-slack, slack) * 0.8 for _ in range(2))
    angle = rng.uniform(-0.15, 0.15) if class_index in UPRIGHT else rng.uniform(-pi, pi)
    squeeze = rng.uniform(0.9, 1.0)

    base = Image.fromarray(background(rng, size).clip(0, 255).astype(np.uint8))
    canvas = base.resize((fine, fine), Image.Resampling.BILINEAR)
    inner = rng.getrandbits(32)
    silhouette = Image.new("L", (fine, fine), 0)
    _draw_mask(silhouette, class_index, center, radius, angle, squeeze, inner)
    canvas = _cast_shadow(canvas, silhouette, rng, radius)
    pen = Pen(ImageDraw.Draw(canvas), center, radius, angle, squeeze)
    OBJECTS[class_index](pen, Random(inner))
    picture = canvas.resize((size, size), Image.Resampling.BOX)
    return _light(picture, rng)


class _MaskDraw:
    """Draws every shape in white, whatever its colour."""

    def __init__(self, image: Image.Image) -> None:
        self._draw = ImageDraw.Draw(image)

    def polygon(self, path, fill) -> None:  # type: ignore[no-untyped-def]
        self._draw.polygon(path, fill=255)

    def line(self, path, fill, width, joint) -> None:  # type: ignore[no-untyped-def]
        self._draw.line(path, fill=255, width=width, joint=joint)

    def ellipse(self, box, fill) -> None:  # type: ignore[no-untyped-def]
        self._draw.ellipse(box, fill=255)


def _draw_mask(image, class_index, center, radius, angle, squeeze, inner) -> None:  # type: ignore[no-untyped-def]
    pen = Pen(_MaskDraw(image), center, radius, angle, squeeze)  # type: ignore[arg-type]
    OBJECTS[class_index](pen, Random(inner))


def _cast_shadow(
    canvas: Image.Image, silhouette: Image.Image, rng: Random, radius: float
) -> Image.Image:
    """A soft shadow of the object, shifted away from the light."""
    shift = tuple(round(radius * rng.uniform(0.06, 0.16)) * s for s in (rng.choice([-1, 1]), 1))
    small = silhouette.resize((silhouette.width // 4, silhouette.height // 4))
    soft = small.filter(ImageFilter.GaussianBlur(radius * 0.015)).resize(silhouette.size)
    mask = Image.new("L", silhouette.size, 0)
    mask.paste(soft.point(lambda value: round(value * 0.4)), shift)
    return Image.composite(Image.new("RGB", canvas.size, (10, 10, 24)), canvas, mask)


def _light(picture: Image.Image, rng: Random) -> Image.Image:
    """Brightness falling off linearly across the picture."""
    size = picture.width
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    angle = rng.uniform(0, 2 * pi)
    gain = rng.uniform(0.92, 1.04) + rng.uniform(0.0, 0.3) * (x * np.cos(angle) + y * np.sin(angle))
    lit = np.asarray(picture, dtype=np.float32) * gain[..., None]
    return Image.fromarray(lit.clip(0, 255).astype(np.uint8))
