"""Call the pipeline on batches such that no image depends on the others in its batch."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sd_tokenmerge.sampling.attention import attention_context
from sd_tokenmerge.sampling.options import ResolvedOptions
from sd_tokenmerge.sampling.plan import ImageJob

_CACHED_PROMPTS = 256


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

    Each image has its own noise generator, exactly as in a pipeline call for that image alone. Each
    prompt is encoded once and by itself, the unconditional branch once per sampler.
    """

    def __init__(self, pipe: Any, options: ResolvedOptions):
        """Sample with `pipe`, patched or not, and the given options.

        Raises:
            ValueError: noise cannot be drawn on the requested device, or the scheduler refuses the
                number of steps.
        """
        kind = torch.device(options.device).type
        if options.noise_device not in ("cpu", kind):
            raise ValueError(
                f"`noise_device` must be cpu or the pipeline's own kind of device, {kind}, "
                f"got {options.noise_device!r}."
            )
        _require_steps(pipe.scheduler, options.steps)
        self._noise_device = "cpu" if options.noise_device == "cpu" else options.device
        self._pipe = pipe
        self._options = options
        self._encoded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._unconditional: dict[str, Tensor] | None = None

    @torch.no_grad()
    def __call__(self, jobs: Sequence[ImageJob]) -> SampledBatch:
        """Generate one batch."""
        options = self._options
        start = time.perf_counter()
        encoded = [self._encode(job.prompt) for job in jobs]
        inputs = {name: torch.cat([one[name] for one in encoded]) for name in encoded[0]}
        generators = [torch.Generator(self._noise_device).manual_seed(job.seed) for job in jobs]
        with attention_context(options.attention_backend):
            output = self._pipe(
                **inputs,
                generator=generators,
                height=options.height,
                width=options.width,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance_scale,
                output_type="np",  # waits for the device, so that `seconds` includes its work
            )
        flagged = getattr(output, "nsfw_content_detected", None) or [False] * len(jobs)
        seconds = (time.perf_counter() - start) / len(jobs)
        return SampledBatch(output.images, [bool(flag) for flag in flagged], seconds)

    def _encode(self, prompt: str) -> dict[str, Tensor]:
        if prompt in self._encoded:
            self._encoded.move_to_end(prompt)
            return self._encoded[prompt]
        guided = self._options.guidance_scale > 1
        first = guided and self._unconditional is None
        outputs = self._pipe.encode_prompt(
            prompt=prompt,
            device=self._pipe._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=first,
            negative_prompt=self._options.negative_prompt if first else None,
        )
        # SD 1 and 2 return (positive, negative), SDXL also both pooled.
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds")
        named = dict(zip((*names, "negative_pooled_prompt_embeds"), outputs, strict=False))
        if first:
            self._unconditional = {k: v for k, v in named.items() if k.startswith("negative")}
        positive = {k: v for k, v in named.items() if not k.startswith("negative")}
        self._encoded[prompt] = positive | (self._unconditional or {})
        if len(self._encoded) > _CACHED_PROMPTS:
            self._encoded.popitem(last=False)
        return self._encoded[prompt]


def _require_steps(scheduler: Any, steps: int) -> None:
    trial = type(scheduler).from_config(scheduler.config)
    try:
        trial.set_timesteps(steps)
    except (ValueError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"`steps` must suit the scheduler, got {steps}: {reason}") from error
