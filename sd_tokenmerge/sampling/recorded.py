"""One picture, with or without the partitions that it was made with."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sd_tokenmerge.patching.apply import PatchHandle
from sd_tokenmerge.patching.recording import Recording
from sd_tokenmerge.sampling.plan import ImageJob
from sd_tokenmerge.sampling.run import NotANumberError
from sd_tokenmerge.sampling.sampler import Sampler


def single_picture(sampler: Sampler, job: ImageJob) -> tuple[Image.Image, float]:
    """Generate one picture.

    Args:
        sampler: makes the picture exactly as in a run with a batch size of 1.
        job: the picture.

    Returns:
        The picture, RGB, and the seconds that it took.

    Raises:
        NotANumberError: the picture has NaN pixels.
    """
    batch = sampler([job])
    pixels = batch.pixels[0]
    if np.isnan(pixels.min()):
        raise NotANumberError([job.file], 1)
    return Image.fromarray((pixels * 255).round().astype(np.uint8)), batch.seconds


def recorded_picture(
    handle: PatchHandle, sampler: Sampler, job: ImageJob
) -> tuple[Image.Image, float, Recording]:
    """Generate one picture, and record the partitions of its blocks, once per denoising step.

    Args:
        handle: the patch of the sampler's pipeline.
        sampler: as for `single_picture`.
        job: the picture.

    Returns:
        The picture, RGB, the seconds that it took, and the recording.

    Raises:
        NotANumberError: the picture has NaN pixels.
    """
    with handle.record() as recording:
        image, seconds = single_picture(sampler, job)
    # Where guidance takes two calls per step, the first has the prompt.
    calls_per_step = len(recording.steps) // len(sampler.pipe.scheduler.timesteps)
    recording.steps = recording.steps[::calls_per_step]
    return image, seconds, recording
