"""The images of a run and their batches, decided once before anything is generated."""

from __future__ import annotations

from typing import NamedTuple

from sd_tokenmerge.sampling.imagenet import class_prompt
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.prompts import read_prompts
from sd_tokenmerge.sampling.seeds import image_seed

MAX_IMAGES = 1_000_000
"""Images of one run."""


class ImageJob(NamedTuple):
    """One image to be generated."""

    class_index: int
    """Number of the class, or of the prompt in its file, from 0."""
    image_index: int
    """Within its class, from 0."""
    seed: int
    prompt: str

    @property
    def file(self) -> str:
        """Its name in the run folder."""
        return image_file(self.class_index, self.image_index)


Batch = tuple[ImageJob, ...]


def image_file(class_index: int, image_index: int) -> str:
    """`{class}_{i}.png`."""
    return f"{class_index}_{image_index}.png"


def plan_images(options: GenerateOptions) -> list[ImageJob]:
    """All images of a run, class by class.

    Args:
        options: with `classes` unless `prompts` are given, as `resolve_options` returns them.

    Raises:
        ValueError: a seed is out of range, the prompt file is unusable, or there are too many
            images.
        OSError: the prompt file cannot be read.
    """
    prompts: list[tuple[int, str, int | None]]
    if options.prompts is not None:
        prompts = [(i, *prompt) for i, prompt in enumerate(read_prompts(options.prompts))]
    else:
        prompts = [
            (index, class_prompt(index, options.prompt_template, options.class_names), None)
            for index in options.classes or ()
        ]
    if len(prompts) * options.images_per_class > MAX_IMAGES:
        raise ValueError(
            f"`images_per_class` must give at most {MAX_IMAGES:,} images, got "
            f"{options.images_per_class} for each of {len(prompts)} prompts."
        )
    return [
        ImageJob(
            class_index,
            image_index,
            image_seed(options.seed, class_index, image_index, options.seed_scheme)
            if first_seed is None
            else first_seed + image_index,
            prompt,
        )
        for class_index, prompt, first_seed in prompts
        for image_index in range(options.images_per_class)
    ]


def planned_files(options: GenerateOptions, num_images: int) -> list[str]:
    """The names of a run's images, without reading its prompt file, which may be gone."""
    per_class = options.images_per_class
    classes = range(num_images // per_class) if options.classes is None else options.classes
    return [image_file(index, i) for index in classes for i in range(per_class)]


def plan_batches(jobs: list[ImageJob], batch_size: int, shard: int, shards: int) -> list[Batch]:
    """The batches of one shard, a contiguous part of all batches.

    Images are divided into batches first, and batches into shards; a batch is always generated as a
    whole. So an image has the same neighbours in any division of the work and after any
    interruption, and is the same to the last bit.

    Args:
        jobs: all images of the run.
        batch_size: images per batch; the last one may be smaller.
        shard: number of the shard, from 0.
        shards: how many shards there are.
    """
    batches = [tuple(jobs[i : i + batch_size]) for i in range(0, len(jobs), batch_size)]
    return batches[len(batches) * shard // shards : len(batches) * (shard + 1) // shards]
