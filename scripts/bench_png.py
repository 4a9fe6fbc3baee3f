"""What storing a picture costs: seconds and bytes of `generate`'s PNG files and of Pillow's own.

python scripts/bench_png.py                     pictures of the sample world
python scripts/bench_png.py --photos PHOTOS     photographs, cropped and resized, too
"""

from __future__ import annotations

import argparse
import io
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from measured import Row, describe, publish, this_command
from PIL import Image, ImageOps
from sample_world import CLASSES, render

from sd_tokenmerge.fid.images import find_images
from sd_tokenmerge.sampling.writer import encode_png

Encode = Callable[[Image.Image], bytes]


def main() -> None:
    """Measure, and print one Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5, help="of which the median counts")
    parser.add_argument("--store", action="store_true", help="keep the rows for docs/experiment.md")
    arguments = parser.parse_args()
    classes = list(CLASSES)
    sets = {
        "sample world, 256 px": [
            render(classes[i % len(classes)], i, 256) for i in range(arguments.images)
        ]
    }
    if arguments.photos is not None:
        paths = find_images(arguments.photos)[: arguments.images]
        sets["photographs, 512 px"] = [photograph(path, 512) for path in paths]
    rows = [row for name, images in sets.items() for row in compare(name, images, arguments.rounds)]
    publish("png", describe(rows, this_command()), store=arguments.store)


def photograph(path: Path, side: int) -> Image.Image:
    """The largest square in the middle, resized."""
    with Image.open(path) as image:
        return ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)


def compare(name: str, images: list[Image.Image], rounds: int) -> list[Row]:
    """One row per encoder."""
    ours, default = "`generate`", "Pillow's default"
    encoders: Mapping[str, Encode] = {
        default: saved(),
        "level 1": saved(compress_level=1),
        "runs only (Z_RLE)": saved(compress_type=zlib.Z_RLE),
        ours: lambda image: encode_png(np.asarray(image, dtype=np.float32) / 255, {}),
    }
    seconds = {label: [] for label in encoders}
    sizes = {}
    for _ in range(rounds):
        for label, encode in encoders.items():
            start = time.thread_time()
            sizes[label] = fmean(len(encode(image)) for image in images)
            seconds[label].append((time.thread_time() - start) / len(images))
    return [
        {
            "pictures": f"{len(images)} of {name}",
            "encoder": label,
            "CPU time: ms": 1000 * median(seconds[label]),
            "size: kB": sizes[label] / 1000,
            "size against default": f"{100 * (sizes[label] / sizes[default] - 1):+.1f} %",
        }
        for label in encoders
    ]


def saved(**options: Any) -> Encode:
    """Pillow's PNG with these options."""

    def encode(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "png", **options)
        return buffer.getvalue()

    return encode


if __name__ == "__main__":
    main()
