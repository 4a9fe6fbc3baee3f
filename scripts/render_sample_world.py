"""Render pictures of the sample pipeline's world into a folder, for use as a reference set.

    python scripts/render_sample_world.py --out demo/full/reference --images-per-class 40

Files are `{class}_{i}.png`. A folder that is there and complete is left alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sample_world import CLASSES, rendered, save


def main() -> None:
    """Write the folder unless it exists."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images-per-class", type=int, default=40)
    options = parser.parse_args()
    if options.images_per_class < 1:
        parser.error(f"--images-per-class must be at least 1, got {options.images_per_class}.")
    if options.out.exists():
        present, wanted = len(list(options.out.iterdir())), len(CLASSES) * options.images_per_class
        if present != wanted:
            parser.error(f"{options.out} must not exist or hold {wanted} pictures, got {present}.")
        return
    pictures = rendered(options.images_per_class)
    save(pictures, options.out)
    print(f"{len(pictures)} pictures written to {options.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
