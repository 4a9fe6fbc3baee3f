"""Which images a run consists of, in which batches: decided once, before anything is generated."""

from __future__ import annotations

from typing import NamedTuple

from sd_tokenmerge.sampling.imagenet import class_prompt
from sd_tokenmerge.sampling.options import GenerateOptions
from sd_tokenmerge.sampling.prompts import read_prompts
from sd_tokenmerge.sampling.seeds import image_seed


class ImageJob(NamedTuple):
    """One image to be generated."""

    class_index: int
    """Of the class, or of the prompt in its file, from 0."""
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
        options: resolved, so that `classes` are given where `prompts` are not.

    Raises:
        ValueError: a seed is out of range, or the prompt file is unusable.
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
    """The names of a run's images, without its prompts: their file may be gone."""
    per_class = options.images_per_class
    classes = range(num_images // per_class) if options.classes is None else options.classes
    return [image_file(index, i) for index in classes for i in range(per_class)]


def plan_batches(jobs: list[ImageJob], batch_size: int, shard: int, shards: int) -> list[Batch]:
    """The batches of one shard, a contiguous part of all batches.

    Batches are cut before shards are, and a batch is always generated as a whole: an image then has
    the same neighbours in any division of the work and after any interruption, and comes out
    the same to the last bit.

    Args:
        jobs: all images of the run.
        batch_size: images per batch; the last one may be smaller.
        shard: which part, from 0.
        shards: how many parts.
    """
    batches = [tuple(jobs[i : i + batch_size]) for i in range(0, len(jobs), batch_size)]
    return batches[len(batches) * shard // shards : len(batches) * (shard + 1) // shards]
