"""Pictures of the sample pipeline and of the world it was trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from sample_world import CLASSES, render

from sd_tokenmerge.sampling.imagenet import class_prompt
from sd_tokenmerge.sampling.seeds import image_seed

PIPELINE = Path(__file__).resolve().parents[1] / "samples" / "pipeline"
REFERENCE_SEED = 2_000_000_000
"""First seed of reference pictures, far from those of training."""

Picture = tuple[int, int, Image.Image]
"""Class, number within the class, image."""


class SamplePipeline:
    """The sample pipeline with the size, steps and guidance it is meant to be run with.

    Attributes:
        pipe: the diffusers pipeline.
        settings: `height`, `width`, `num_inference_steps` and `guidance_scale` of a call.
    """

    def __init__(self, folder: Path = PIPELINE, device: str = "cpu") -> None:
        """Load a pipeline from its folder."""
        self.pipe: Any = StableDiffusionPipeline.from_pretrained(folder).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        sample = json.loads((folder / "sample.json").read_text(encoding="utf-8"))
        self.settings = {
            "height": sample["size"],
            "width": sample["size"],
            "num_inference_steps": sample["steps"],
            "guidance_scale": sample["guidance_scale"],
        }

    def generate(self, per_class: int, batch_size: int, classes: Sequence[int]) -> list[Picture]:
        """Pictures of every class under the paper's seeds."""
        wanted = [(c, i) for c in classes for i in range(per_class)]
        pictures = []
        for first in range(0, len(wanted), batch_size):
            batch = wanted[first : first + batch_size]
            images = self.pipe(
                [class_prompt(c) for c, _ in batch],
                generator=[torch.Generator().manual_seed(image_seed(0, c, i)) for c, i in batch],
                **self.settings,
            ).images
            pictures += [(c, i, image) for (c, i), image in zip(batch, images, strict=True)]
        return pictures


def rendered(
    per_class: int, first_seed: int = REFERENCE_SEED, classes: Sequence[int] = CLASSES
) -> list[Picture]:
    """Pictures of every class from the renderer."""
    return [(c, i, render(c, first_seed + i)) for c in classes for i in range(per_class)]


def save(pictures: Sequence[Picture], folder: Path) -> None:
    """Write pictures as `{class}_{i}.png`; the folder appears when it is complete."""
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for c, i, image in pictures:
        image.save(partial / f"{c}_{i}.png")
    os.replace(partial, folder)
