"""Timed calls of a denoiser. Imports only `turns`, as the package explains."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from sd_tokenmerge.bench.turns import Cost

TIMESTEPS = 50
"""Length of the `timesteps` from which the calls take theirs."""


class Calls(Protocol):
    """Calls of a denoiser on inputs that are always the same."""

    denoiser: Any
    """A UNet or a transformer."""

    def call(self, timestep: Tensor, size: tuple[int, int]) -> Tensor:
        """Output for a size that is not the timed one."""

    def timed(self, timestep: Tensor) -> Cost:
        """Cost of a call."""

    def timesteps(self) -> Tensor:
        """Timesteps of a new generation."""


def finest_transformers(unet: Any) -> tuple[int, list[nn.Module]]:
    """The finest level that has attention, and its transformers in the order in which they run.

    Level 0 has the resolution of the latents, and each further level half of the one before.
    """
    levels: dict[int, list[nn.Module]] = {}
    last = len(unet.down_blocks) - 1
    for index, block in enumerate(unet.down_blocks):
        levels.setdefault(index, []).extend(getattr(block, "attentions", ()))
    for index, block in enumerate(unet.up_blocks):
        levels[last - index].extend(getattr(block, "attentions", ()))
    level = min(level for level, transformers in levels.items() if transformers)
    return level, levels[level]


def timed_step(calls: Calls, refresh_every: int) -> tuple[Cost, list[Cost]]:
    """Cost per denoising step over the life of a partition, and its components.

    Args:
        calls: of the denoiser.
        refresh_every: steps for which a partition is used. If more than one, a call with a new
            partition and a call with a kept one are timed.
    """
    steps = calls.timesteps()
    fresh = calls.timed(steps[10])
    if refresh_every == 1:
        return fresh, [fresh]
    kept = calls.timed(steps[11])
    per_step = (
        (a + (refresh_every - 1) * b) / refresh_every for a, b in zip(fresh, kept, strict=True)
    )
    return Cost(*per_step), [fresh, kept]
