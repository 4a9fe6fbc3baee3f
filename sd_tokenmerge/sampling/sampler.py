"""Call the pipeline on batches such that no image depends on the others in its batch."""

from __future__ import annotations

import inspect
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sd_tokenmerge.patching.sites import find_denoiser
from sd_tokenmerge.sampling.attention import attention_context
from sd_tokenmerge.sampling.call_defaults import guidance_argument
from sd_tokenmerge.sampling.options import ResolvedOptions
from sd_tokenmerge.sampling.plan import ImageJob


@dataclass(frozen=True)
class SampledBatch:
    """The pipeline's output for one batch of B images.

    Attributes:
        pixels: `[B, height, width, 3]` float32 in [0, 1], or NaN.
        flagged: `[B]`, whether the safety checker blacked each image out.
        seconds: wall time of the call per image, including the device's work.
    """

    pixels: NDArray[np.float32]
    flagged: list[bool]
    seconds: float


class Sampler:
    """Generates batches of images with one pipeline.

    Each image has its own noise generator, exactly as in a pipeline call for that image alone.
    """

    def __init__(self, pipe: Any, options: ResolvedOptions):
        """Sample with `pipe`, patched or not, and the given options.

        Raises:
            ValueError: noise cannot be drawn on the requested device, the scheduler refuses the
                number of steps, or the pipeline takes no negative prompt.
        """
        kind = torch.device(options.device).type
        if options.noise_device not in ("cpu", kind):
            raise ValueError(
                f"`noise_device` must be cpu or the pipeline's own kind of device, {kind}, "
                f"got {options.noise_device!r}."
            )
        _require_steps(pipe.scheduler, options.steps)
        self.pipe = pipe
        self._noise_device = "cpu" if options.noise_device == "cpu" else options.device
        self._options = options
        accepted = inspect.signature(pipe.__call__).parameters
        guidance, self._negative_prompt = _guidance(pipe, accepted, options)
        self._arguments = guidance | {k: v for k, v in _AS_GIVEN.items() if k in accepted}

    @torch.no_grad()
    def __call__(self, jobs: Sequence[ImageJob]) -> SampledBatch:
        """Generate one batch."""
        options = self._options
        arguments = dict(self._arguments)
        if self._negative_prompt is not None:
            arguments["negative_prompt"] = [self._negative_prompt] * len(jobs)
        start = time.perf_counter()
        with attention_context(options.attention_backend):
            output = self.pipe(
                prompt=[job.prompt for job in jobs],
                generator=[torch.Generator(self._noise_device).manual_seed(j.seed) for j in jobs],
                height=options.height,
                width=options.width,
                num_inference_steps=options.steps,
                output_type="np",  # waits for the device, so that `seconds` includes its work
                **arguments,
            )
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(jobs)
        seconds = (time.perf_counter() - start) / len(jobs)
        return SampledBatch(output.images, [bool(flag) for flag in flagged], seconds)


_AS_GIVEN = {"use_resolution_binning": False, "clean_caption": False}
"""Arguments by which some pipelines use the size and the prompt as they are given."""


def _guidance(
    pipe: Any, accepted: Collection[str], options: ResolvedOptions
) -> tuple[dict[str, Any], str | None]:
    """The pipeline's argument for the guidance scale, and the negative prompt.

    `true_cfg_scale` is used only with a negative prompt.

    Raises:
        ValueError: the pipeline takes no negative prompt.
    """
    scale, negative = options.guidance_scale, options.negative_prompt
    denoiser: Any = find_denoiser(pipe)
    argument = guidance_argument(accepted, denoiser.config)
    is_true = argument == "true_cfg_scale"
    takes_negative = is_true or ("negative_prompt" in accepted and "true_cfg_scale" not in accepted)
    if negative is not None and not takes_negative:
        raise ValueError(
            f"`negative_prompt` must not be given: this {type(pipe).__name__} has no "
            "classifier-free guidance."
        )
    if is_true:
        return {argument: scale}, (negative or "") if scale > 1 else None
    return {argument: scale}, negative


def _require_steps(scheduler: Any, steps: int) -> None:
    trial = type(scheduler).from_config(scheduler.config)
    # Pipelines compute `mu` from the image's size.
    shift = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    try:
        trial.set_timesteps(steps, **shift)
    except (ValueError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`steps` must suit the scheduler, got {steps}: {reason}") from error
