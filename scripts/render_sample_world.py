"""Render pictures of the sample pipeline's world into a folder, for use as a reference set.

    python scripts/render_sample_world.py --out demo/reference --images-per-class 40

Seeds are far from those of training. Files are `{class}_{i}.png`; existing ones are kept.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sample_world import CLASSES, render

FIRST_SEED = 2_000_000_000


def main() -> None:
    """Write what is missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images-per-class", type=int, default=40)
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    parser.add_argument("--first-seed", type=int, default=FIRST_SEED)
    options = parser.parse_args()
    if options.images_per_class < 1:
        parser.error(f"--images-per-class must be at least 1, got {options.images_per_class}.")
    options.out.mkdir(parents=True, exist_ok=True)
    written = 0
    for class_index in CLASSES:
        for i in range(options.images_per_class):
            path = options.out / f"{class_index}_{i}.png"
            if path.exists():
                continue
            partial = path.with_suffix(".partial")
            render(class_index, options.first_seed + i, options.size).save(partial, format="PNG")
            os.replace(partial, path)
            written += 1
    print(f"{written} pictures written to {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
