"""Sets of pictures of the world, in memory and as folders."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sample_world.objects import OBJECTS
from sample_world.render import render

CLASSES = tuple(sorted(OBJECTS))
"""ImageNet class indices of the world, ascending."""
REFERENCE_SEED = 2_000_000_000
"""First seed of reference pictures, far from those of training."""

Picture = tuple[int, int, Image.Image]
"""Class, number within the class, image."""


def rendered(per_class: int, first_seed: int = REFERENCE_SEED, size: int = 256) -> list[Picture]:
    """Pictures of every class, the i-th of a class with seed `first_seed + i`."""
    return [(c, i, render(c, first_seed + i, size)) for c in CLASSES for i in range(per_class)]


def save(pictures: Sequence[Picture], folder: Path) -> None:
    """Write pictures as `{class}_{i}.png`; the folder appears when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for c, i, image in pictures:
        image.save(partial / f"{c}_{i}.png")
    os.replace(partial, folder)
