"""Timed calls of a pipeline's denoiser, with the inputs that the pipeline gives it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sd_tokenmerge.bench.calls import TIMESTEPS
from sd_tokenmerge.bench.turns import Cost, timed
from sd_tokenmerge.patching.families import Clock, find_family
from sd_tokenmerge.patching.sites import find_denoiser
from sd_tokenmerge.sampling.attention import attention_context
from sd_tokenmerge.sampling.merging import pixels_per_token, require_whole_tokens
from sd_tokenmerge.sampling.options import ResolvedOptions
from sd_tokenmerge.sampling.plan import ImageJob
from sd_tokenmerge.sampling.sampler import Sampler

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of a call."""


class PipelineCalls:
    """Calls of a pipeline's denoiser.

    Attributes:
        denoiser: a UNet or a transformer.
    """

    def __init__(self, pipe: Any, options: ResolvedOptions, job: ImageJob):
        """Prepare calls.

        Args:
            pipe: the pipeline, unpatched.
            options: of a run; its image size is that of timed calls.
            job: the picture from whose first step the inputs are.

        Raises:
            ValueError: the image size is not a whole number of tokens.
        """
        require_whole_tokens(pipe, options)
        self.denoiser: Any = find_denoiser(pipe)
        self._pipe, self._options, self._job = pipe, options, job
        self._pixels_per_token = pixels_per_token(pipe)
        family = find_family(self.denoiser)
        self._place = 1 if family is None else family.timestep
        self._clock = Clock() if family is None else family.clock
        self._captured: dict[tuple[int, int], Inputs] = {}

    def call(self, timestep: Tensor, size: tuple[int, int]) -> Tensor:
        """Output for a picture of (height, width) tokens."""
        height, width = (self._pixels_per_token * side for side in size)
        return self._run(timestep, self._inputs(height, width))

    def timed(self, timestep: Tensor) -> Cost:
        """Cost of a call at the options' image size."""
        inputs = self._inputs(self._options.height, self._options.width)
        return timed(lambda: self._run(timestep, inputs))

    def timesteps(self) -> Tensor:
        """Timesteps of a new generation, as the denoiser takes them."""
        args, kwargs = self._inputs(self._options.height, self._options.width)
        like = kwargs["timestep"] if "timestep" in kwargs else args[self._place]
        times = self._clock.from_scheduler(self._pipe.scheduler.timesteps)
        return torch.linspace(float(times[0]), float(times[-1]), TIMESTEPS).to(like)

    @torch.no_grad()
    def _run(self, timestep: Tensor, inputs: Inputs) -> Tensor:
        args, kwargs = list(inputs[0]), dict(inputs[1])
        if "timestep" in kwargs:
            kwargs["timestep"] = timestep.expand(kwargs["timestep"].shape)
        else:
            args[self._place] = timestep.expand(args[self._place].shape)
        with attention_context(self._options.attention_backend):
            output: Tensor = self.denoiser(*args, **kwargs)[0]
        return output

    def _inputs(self, height: int, width: int) -> Inputs:
        """The arguments of the pipeline's first call at an image size."""
        size = height, width
        if size not in self._captured:

            def capture(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self._captured[size] = args, kwargs
                raise _CapturedError

            hook = self.denoiser.register_forward_pre_hook(capture, prepend=True, with_kwargs=True)
            try:
                Sampler(self._pipe, replace(self._options, height=height, width=width))([self._job])
            except _CapturedError:
                pass
            finally:
                hook.remove()
        return self._captured[size]


class _CapturedError(Exception):
    """Ends a pipeline's call before the denoiser runs."""
