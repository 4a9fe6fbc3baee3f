from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sd_tokenmerge.sampling.attention import set_attention
from sd_tokenmerge.sampling.options import GenerateOptions, ResolvedOptions
from sd_tokenmerge.sampling.plan import ImageJob, plan_images
from sd_tokenmerge.sampling.resolve import resolve_options
from sd_tokenmerge.sampling.sampler import Sampler
from tests.tiny_models import tiny_sd15, tiny_sd21, tiny_sdxl

BATCH_TOLERANCE = 1e-5
"""Batch 1 against batch 4 on the CPU, pixels in [0, 1]: rounding in differently shaped products."""


def resolved(**changes: Any) -> ResolvedOptions:
    values = {"classes": (0, 1), "height": 64, "width": 32, "steps": 3, "device": "cpu"}
    return resolve_options(GenerateOptions(out="-", model="tiny", **values | changes))


def bare_call(pipe: Any, job: ImageJob, **changes: Any) -> np.ndarray:
    values: dict[str, Any] = {
        "height": 64,
        "width": 32,
        "num_inference_steps": 3,
        "guidance_scale": 7.5,
        "output_type": "np",
    }
    generator = torch.Generator().manual_seed(job.seed)
    return pipe(job.prompt, generator=generator, **values | changes).images[0]


@pytest.mark.parametrize("make", [tiny_sd15, tiny_sd21, tiny_sdxl])
def test_images_are_those_of_bare_pipeline_calls(make: Callable[[], Any]) -> None:
    pipe = make()
    options = resolved()
    jobs = plan_images(options)
    sampler = Sampler(pipe, options)
    for job in jobs:
        batch = sampler([job])
        assert batch.pixels.shape == (1, 64, 32, 3)
        assert batch.flagged == [False]
        assert batch.seconds > 0
        np.testing.assert_array_equal(batch.pixels[0], bare_call(pipe, job))


@pytest.mark.parametrize("scheduler", ["PNDM", "EulerAncestralDiscrete"])
def test_batches_mix_prompts_without_changing_images(scheduler: str) -> None:
    import diffusers

    pipe = tiny_sd15()
    cls = getattr(diffusers, f"{scheduler}Scheduler")
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    options = resolved()
    jobs = plan_images(options)
    together = Sampler(pipe, options)(jobs).pixels
    alone = np.concatenate([Sampler(pipe, options)([job]).pixels for job in jobs])
    np.testing.assert_allclose(together, alone, atol=BATCH_TOLERANCE, rtol=0)
    assert not np.allclose(alone[0], alone[1], atol=1e-2)


def test_negative_prompt_and_no_guidance() -> None:
    pipe = tiny_sd15()
    job = ImageJob(0, 0, 1, "a cat")
    plain = bare_call(pipe, job)
    negative = Sampler(pipe, resolved(negative_prompt="blue"))([job]).pixels[0]
    np.testing.assert_array_equal(negative, bare_call(pipe, job, negative_prompt="blue"))
    assert not np.array_equal(negative, plain)
    unguided = Sampler(pipe, resolved(guidance_scale=1.0))([job]).pixels[0]
    np.testing.assert_array_equal(unguided, bare_call(pipe, job, guidance_scale=1.0))
    assert not np.array_equal(unguided, plain)


def test_noise_comes_from_the_cpu_or_the_pipelines_device() -> None:
    for device in ("cuda", "nonsense"):
        with pytest.raises(ValueError, match="`noise_device` must be cpu or"):
            Sampler(tiny_sd15(), resolved(noise_device=device))


@pytest.mark.parametrize("backend", ["math", "flash", "eager", "sliced"])
def test_attention_backends_agree(backend: str) -> None:
    job = ImageJob(0, 0, 1, "a cat")
    plain = Sampler(tiny_sd15(), resolved())([job]).pixels
    pipe = tiny_sd15()
    set_attention(pipe, backend, "cpu")
    pixels = Sampler(pipe, resolved(attention_backend=backend))([job]).pixels
    np.testing.assert_allclose(pixels, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("backend", ["efficient", "xformers"])
def test_attention_that_the_cpu_does_not_have_is_refused(backend: str) -> None:
    with pytest.raises(ValueError, match=f"`attention_backend` '{backend}' cannot be used here"):
        set_attention(tiny_sd15(), backend, "cpu")
