"""What merging changes in a UNet's call, by itself: its self-attentions at the finest level.

Everything else is the same work whether tokens are merged or not, and takes most of the call. On a
machine whose speed drifts, a difference of a few per cent of calls that take seconds each is lost
in the drift; of the merged self-attentions alone it is not.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import Any

import torch
from timed_unet import TimedUNet
from torch import Tensor, nn

from sd_tokenmerge.sites import find_sites


class AttentionCalls:
    """The merged self-attentions of a UNet's calls, in the place of `TimedUNet` in `take_turns`.

    Each gets what it got in one call of the unpatched UNet. It is timed from the start of its block
    to the norm after it: the norm before it, choosing clusters, merging, attention, unmerging, and
    the sum with the block's input.

    Attributes:
        unet: the model.
        batch: images per call.
        device: it is on.
    """

    def __init__(self, calls: TimedUNet) -> None:
        """Record the inputs, by one call of the UNet."""
        self._calls = calls
        self.unet, self.batch, self.device = calls.unet, calls.batch, calls.device
        sites = find_sites(self.unet)
        finest = min(site.level for site in sites)
        self._sites = [site for site in sites if site.level == finest]
        self._last = {site.transformer: site for site in self._sites}
        self._inputs: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs[module] = (args, kwargs)

        with ExitStack() as hooks:
            for transformer in self._last:
                hook = transformer.register_forward_pre_hook(record, with_kwargs=True)
                hooks.callback(hook.remove)
            calls.timed(self.timesteps()[0])

    def timesteps(self) -> Tensor:
        """Those of a new generation."""
        return self._calls.timesteps()

    @torch.no_grad()
    def timed(self, timestep: Tensor) -> float:
        """Seconds of all merged self-attentions in a call of the UNet."""
        self._announce(timestep)
        clock = _Clock(self._calls)
        with ExitStack() as hooks:
            for site in self._sites:
                is_last = self._last[site.transformer] is site
                end = clock.stop_all if is_last else clock.stop
                for module, note in ((site.block, clock.start), (site.block.norm2, end)):
                    hook = module.register_forward_pre_hook(note, prepend=True)
                    hooks.callback(hook.remove)
            for transformer, (arguments, keywords) in self._inputs.items():
                _run_until_stopped(transformer, *arguments, **keywords)
        return clock.seconds

    def _announce(self, timestep: Tensor) -> None:
        """Tell what patches the UNet of a call, and no more."""
        sample, keywords = self._calls.inputs(self._calls.latent, self._calls.latent)
        hook = self.unet.conv_in.register_forward_pre_hook(_stop)
        try:
            _run_until_stopped(self.unet, sample, timestep, **keywords)
        finally:
            hook.remove()


class _StoppedError(Exception):
    """What comes after this is not wanted."""


def _stop(*_: object) -> None:
    raise _StoppedError


def _run_until_stopped(module: Any, *arguments: Any, **keywords: Any) -> None:
    try:
        module(*arguments, **keywords)
    except _StoppedError:
        return
    raise RuntimeError(f"a {type(module).__name__} must come by where it is stopped.")


class _Clock:
    """Forward pre-hooks that add up the time between them."""

    def __init__(self, calls: TimedUNet) -> None:
        self._calls = calls
        self._started = self.seconds = 0.0

    def start(self, *_: object) -> None:
        self._calls.synchronize()
        self._started = time.perf_counter()

    def stop(self, *_: object) -> None:
        self._calls.synchronize()
        self.seconds += time.perf_counter() - self._started

    def stop_all(self, *_: object) -> None:
        self.stop()
        raise _StoppedError
