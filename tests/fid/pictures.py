"""Synthetic pictures of classes, and the ways in which tests degrade them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from sd_tokenmerge.sampling.imagenet import val_first_five

SIZE = 160


def draw(class_index: int, image_index: int) -> Image.Image:
    """A smooth background, a striped disc and fine grain; colours and stripes tell the class."""
    rng = np.random.default_rng([class_index, image_index])
    colour = np.random.default_rng(class_index).uniform(30, 225, (2, 3))
    y, x = np.mgrid[:SIZE, :SIZE] / SIZE
    centre, radius, angle = rng.uniform(0.35, 0.65, 2), rng.uniform(0.2, 0.35), rng.uniform(0, 3)
    shade = (x * np.cos(angle) + y * np.sin(angle))[..., None]
    pixels = colour[0] * (0.6 + 0.4 * shade)
    stripes = np.sin((x + y) * (20 + 9 * (class_index % 5)) + rng.uniform(0, 6)) > 0
    disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2
    pixels[disc & stripes] = colour[1]
    pixels[disc & ~stripes] = 255 - colour[1]
    pixels += rng.normal(0, 6, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def blur(image: Image.Image, strength: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(strength))


def noise(image: Image.Image, strength: float) -> Image.Image:
    grain = np.random.default_rng(0).normal(0, strength, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, strength: float) -> Image.Image:
    """`strength` is 100 minus the quality."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=round(100 - strength))
    return Image.open(buffer).convert("RGB")


def mosaic(image: Image.Image, strength: float) -> Image.Image:
    size = (round(image.width / strength), round(image.height / strength))
    small = image.resize(size, Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)


DEGRADATIONS = {
    "blur": (blur, (1, 2, 4, 8)),
    "noise": (noise, (10, 20, 40, 80)),
    "jpeg": (jpeg, (5, 25, 50, 75, 90)),
    "mosaic": (mosaic, (4, 8, 16)),
}


def fill(folder: Path, num_classes: int, per_class: int) -> Path:
    """Write `{class}_{image}.png` files."""
    folder.mkdir(parents=True)
    for class_index in range(num_classes):
        for image_index in range(per_class):
            picture = draw(class_index, image_index)
            picture.save(folder / f"{class_index}_{image_index}.png")
    return folder


def tiny_jpeg(number: int) -> bytes:
    """Four pixels that tell the number."""
    pixels = Image.new("L", (4, 1))
    pixels.putdata([(number >> shift & 15) * 17 for shift in (12, 8, 4, 0)])
    buffer = io.BytesIO()
    pixels.save(buffer, "JPEG", quality=100)
    return buffer.getvalue()


def write_validation_set(folder: Path, further: Iterable[int] = ()) -> None:
    """The 5,000 reference images among others, flat, under the names of the validation set."""
    folder.mkdir(parents=True)
    for number in [*(number for numbers in val_first_five() for number in numbers), *further]:
        (folder / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(tiny_jpeg(number))
