"""The seed of an image: a function of (base seed, class, image) and nothing else."""

from __future__ import annotations

import hashlib
from typing import Literal, get_args

SeedScheme = Literal["paper", "hashed"]

SEED_LIMIT = 2**63
"""Seeds are in [0, 2^63), what every torch generator takes."""


def image_seed(base: int, class_index: int, image_index: int, scheme: SeedScheme = "paper") -> int:
    """Seed of image `image_index` of class `class_index`.

    `"paper"` is ATC's published formula, `base + int(f"{class_index}{image_index}")`. It gives
    class 1, image 10 and class 11, image 0 the same seed, so it is refused from image 10 on.
    `"hashed"` serves any number of images: the first 63 bits of SHA-256 of the three numbers.

    Args:
        base: the run's seed, at least 0. With `"paper"`, runs whose bases are less than 10,000
            apart share seeds.
        class_index: number of the class or prompt, at least 0.
        image_index: number of the image within its class, at least 0; below 10 with `"paper"`.
        scheme: the formula.

    Raises:
        ValueError: an argument is out of range.
    """
    numbers = {"base": base, "class_index": class_index, "image_index": image_index}
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"`{name}` must not be negative, got {value}.")
    if scheme == "hashed":
        digest = hashlib.sha256(f"{base},{class_index},{image_index}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1
    if scheme != "paper":
        raise ValueError(f"`scheme` must be one of {get_args(SeedScheme)}, got {scheme!r}.")
    if image_index > 9:
        raise ValueError(
            f"`image_index` must be below 10 with the paper's seeds, got {image_index}. From there "
            f"on they collide (class 1, image 10 and class 11, image 0); use the hashed scheme "
            f"(`seed_scheme`)."
        )
    seed = base + int(f"{class_index}{image_index}")
    if seed >= SEED_LIMIT:
        raise ValueError(f"`base` must leave seeds below 2^63, got {base}.")
    return seed
