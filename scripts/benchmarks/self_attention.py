"""The part of a UNet call that merging changes: the self-attentions at the finest level.

Everything else is the same work whether tokens are merged or not, and takes most of the call. On a
machine with drifting speed, differences of a few per cent are lost in calls that take seconds, but
not in the merged self-attentions alone. Imports nothing from sd_tokenmerge, so that it works
with any commit of it.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.unet_calls import UNetCalls
from sd_tokenmerge.bench.calls import finest_transformers
from sd_tokenmerge.bench.turns import Cost, clock, elapsed


class SelfAttentionCalls:
    """The merged self-attentions of a UNet's calls, of the form of `bench.calls.Calls`.

    Each gets the input it had in one call of the unpatched UNet, and is timed from the start of its
    block to the norm after it: the norm before it, choosing clusters, merging, attention,
    unmerging, and the sum with the block's input.

    Attributes:
        unet: the model.
        batch: images per call.
        device: the model's device.
    """

    def __init__(self, calls: UNetCalls) -> None:
        """Record the inputs in one call of the UNet."""
        self._calls = calls
        self.denoiser, self.batch, self.device = calls.denoiser, calls.batch, calls.device
        _, self._transformers = finest_transformers(self.denoiser)
        self._inputs: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[module] = (args, kwargs)

        with ExitStack() as hooks:
            for transformer in self._transformers:
                hook = transformer.register_forward_pre_hook(record, with_kwargs=True)
                hooks.callback(hook.remove)
            calls.timed(self.timesteps()[0])

    def timesteps(self) -> Tensor:
        """Timesteps of a new generation."""
        return self._calls.timesteps()

    @torch.no_grad()
    def timed(self, timestep: Tensor) -> Cost:
        """Cost of all merged self-attentions in a call of the UNet.

        The UNet is really called, so that hooks of its patch run; only its `forward` is replaced by
        one that runs nothing but the self-attentions.
        """
        stopwatch = _Stopwatch()

        def forward(sample: Tensor, *_: object, **__: object) -> tuple[Tensor]:
            for transformer, (arguments, keywords) in self._inputs.items():
                _run_until_stopped(transformer, *arguments, **keywords)
            return (sample,)

        with ExitStack() as hooks:
            for transformer in self._transformers:
                *blocks, last = transformer.transformer_blocks
                for block in (*blocks, last):
                    stop = stopwatch.stop_all if block is last else stopwatch.stop
                    for module, note in ((block, stopwatch.start), (block.norm2, stop)):
                        hook = module.register_forward_pre_hook(note, prepend=True)
                        hooks.callback(hook.remove)
            sample, keywords = self._calls.inputs(self._calls.latent, self._calls.latent)
            self.denoiser.forward = forward
            hooks.callback(delattr, self.denoiser, "forward")
            self.denoiser(sample, timestep, **keywords)
        return Cost(stopwatch.wall, stopwatch.cpu)


class _StoppedError(Exception):
    """Raised to skip the rest of a transformer."""


def _run_until_stopped(module: Any, *arguments: Any, **keywords: Any) -> None:
    try:
        module(*arguments, **keywords)
    except _StoppedError:
        return
    raise RuntimeError(f"a {type(module).__name__} must run the norm after its self-attention.")


class _Stopwatch:
    """Forward pre-hooks that add up the cost between `start` and `stop`."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def start(self, *_: object) -> None:
        self._started = clock()

    def stop(self, *_: object) -> None:
        cost = elapsed(self._started)
        self.wall += cost.wall
        self.cpu += cost.cpu

    def stop_all(self, *_: object) -> None:
        self.stop()
        raise _StoppedError
