"""Draw what each method merges in a picture of the sample pipeline, for the documentation.

    python scripts/draw_methods.py                writes docs/pictures/

All methods cluster the same tokens: the input of the last self-attention at the finest level, in
the middle of an unmerged generation. They keep a quarter of them, or as few as they can.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from sample_pictures import SamplePipeline
from torch import Tensor

from sd_tokenmerge import PRESETS, apply_patch, draw_clusters, parse_method, partition
from sd_tokenmerge.methods import Grid
from sd_tokenmerge.partitions import clusters_to_keep
from sd_tokenmerge.patching.sites import find_sites
from sd_tokenmerge.report.contact_sheet import PictureGrid, contact_sheet
from sd_tokenmerge.sampling.imagenet import class_prompt
from sd_tokenmerge.sampling.seeds import image_seed

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"

LADYBUG = 301
KEEP_RATE = 0.25
METHODS = {
    "atc": ("atc:linkage=average", "atc:linkage=complete", "atc:linkage=single"),
    "tome": ("tome",),
    "tome-sd": ("tome-sd", "tome-sd:random=true"),
    "lotm": ("lotm", "lotm:neighbours=grid"),
    "kmeans": ("kmeans",),
    "kmedoids": ("kmedoids",),
    "dpc-knn": ("dpc-knn",),
    "controls": ("grid", "random"),
}
"""The methods in each picture, by its file's name; the unmerged picture stands beside them."""


class Generation:
    """One picture, made again and again from the same noise.

    Attributes:
        sample: the sample pipeline.
        class_index: of the ImageNet class in the prompt.
    """

    def __init__(self, sample: SamplePipeline, class_index: int) -> None:
        """Remember what is generated."""
        self.sample = sample
        self.class_index = class_index

    def picture(self) -> Image.Image:
        """The picture that the pipeline makes as it is now."""
        seed = image_seed(0, self.class_index, 0)
        image: Image.Image = self.sample.pipe(
            class_prompt(self.class_index),
            generator=torch.Generator().manual_seed(seed),
            **self.sample.settings,
        ).images[0]
        return image

    def picture_and_tokens(self) -> tuple[Image.Image, Tensor]:
        """The picture, and the tokens `[1, N, C]` that the methods cluster."""
        block = [site.block for site in find_sites(self.sample.pipe.unet) if site.level == 0][-1]
        inputs: list[Tensor] = []
        hook = block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        with hook:
            image = self.picture()
        return image, inputs[len(inputs) // 2][-1:]  # the half with the prompt comes last


def clusters(image: Image.Image, tokens: Tensor, name: str) -> tuple[Image.Image, str]:
    """The clusters of one method drawn over the picture, and how many there are."""
    side = round(tokens.shape[1] ** 0.5)
    grid = Grid(side, side)
    method = parse_method(name)
    wanted = clusters_to_keep(grid.num_tokens, KEEP_RATE)
    kept = max(wanted, method.smallest_num_clusters(grid))
    labels = partition(tokens, method, num_clusters=kept, grid=grid).labels
    drawn = draw_clusters(image, labels.view(side, side).numpy())
    return drawn, f"{kept:,} of {grid.num_tokens:,} tokens are kept."


def write(path: Path, pictures: dict[str, Image.Image], caption: str) -> None:
    """Write a sheet of labelled pictures beside each other."""
    grid = PictureGrid(
        heading="", rows=[""], columns=list(pictures), cells=[list(pictures.values())]
    )
    contact_sheet([grid], cell=256, caption=caption).save(path, quality=90)


def main() -> None:
    """Write all pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURES)
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    generation = Generation(SamplePipeline(), LADYBUG)
    image, tokens = generation.picture_and_tokens()
    for file, methods in METHODS.items():
        pictures = {"unmerged": image}
        for name in methods:
            label = name.partition(":")[2] or name
            pictures[label], caption = clusters(image, tokens, name)
        write(folder / f"{file}.jpg", pictures, caption)
    pictures = {"unmerged": image}
    for preset in PRESETS:
        with apply_patch(generation.sample.pipe, preset=preset):
            pictures[preset] = generation.picture()
    write(folder / "presets.jpg", pictures, "")


if __name__ == "__main__":
    main()
