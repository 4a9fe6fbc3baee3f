"""One picture with the partitions that it was made with."""

from __future__ import annotations

import numpy as np
from PIL import Image

from sd_tokenmerge.patching.apply import PatchHandle
from sd_tokenmerge.patching.recording import Recording
from sd_tokenmerge.sampling.plan import ImageJob
from sd_tokenmerge.sampling.run import NotANumberError
from sd_tokenmerge.sampling.sampler import Sampler


def recorded_picture(
    handle: PatchHandle, sampler: Sampler, job: ImageJob
) -> tuple[Image.Image, Recording]:
    """Generate one picture, and record the partitions of its blocks, once per denoising step.

    Args:
        handle: the patch of the sampler's pipeline.
        sampler: makes the picture exactly as in a run with a batch size of 1.
        job: the picture.

    Raises:
        NotANumberError: the picture has NaN pixels.
    """
    with handle.record() as recording:
        pixels = sampler([job]).pixels[0]
    # Where guidance takes two calls per step, the first has the prompt.
    calls_per_step = len(recording.steps) // len(sampler.pipe.scheduler.timesteps)
    recording.steps = recording.steps[::calls_per_step]
    if np.isnan(pixels.min()):
        raise NotANumberError([job.file], 1)
    return Image.fromarray((pixels * 255).round().astype(np.uint8)), recording
