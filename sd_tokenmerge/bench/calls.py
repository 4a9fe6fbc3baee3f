"""Timed calls of a UNet. Imports only `turns`, as the package explains."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sd_tokenmerge.bench.turns import Cost, timed

TIMESTEPS = 50
"""Length of the `timesteps` from which the calls take theirs."""


class Calls(Protocol):
    """Calls of a denoiser on inputs that are always the same."""

    unet: Any
    """The denoiser, a UNet or a transformer."""

    def call(self, timestep: Tensor, size: tuple[int, int]) -> Tensor:
        """Output for a size that is not the timed one."""

    def timed(self, timestep: Tensor) -> Cost:
        """Cost of a call."""

    def timesteps(self) -> Tensor:
        """Timesteps of a new generation."""


class UNetCalls:
    """Calls of a UNet on random inputs.

    Attributes:
        unet: the model.
        device: its device.
        dtype: its precision.
        latent: height and width of the latents in timed calls.
        batch: images per call.
    """

    def __init__(self, unet: Any, *, latent: int, batch: int):
        """Prepare calls of `unet`, an (S)DXL or Stable Diffusion 1 or 2 `UNet2DConditionModel`."""
        self.unet, self.latent, self.batch = unet, latent, batch
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype

    def inputs(self, height: int, width: int) -> tuple[Tensor, dict[str, Any]]:
        """Sample and keyword arguments of a call, without the timestep."""
        generator = torch.Generator().manual_seed(1)
        config = self.unet.config

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        keywords: dict[str, Any] = {
            "encoder_hidden_states": draw(self.batch, 77, config.cross_attention_dim),
            "return_dict": False,
        }
        if config.addition_embed_type == "text_time":
            times = 6 * config.addition_time_embed_dim
            pooled = config.projection_class_embeddings_input_dim - times
            sizes = torch.tensor([8.0 * height, 8.0 * width, 0, 0, 8.0 * height, 8.0 * width])
            keywords["added_cond_kwargs"] = {
                "text_embeds": draw(self.batch, pooled),
                "time_ids": sizes.repeat(self.batch, 1).to(self.device, self.dtype),
            }
        return draw(self.batch, config.in_channels, height, width), keywords

    @torch.no_grad()
    def call(self, timestep: Tensor, size: tuple[int, int], module: Any = None) -> Tensor:
        """Output of the UNet, or of a `module` made of it, on latents of (height, width)."""
        module = self.unet if module is None else module
        sample, keywords = self.inputs(*size)
        output: Tensor = module(sample, timestep, **keywords)[0]
        return output

    @torch.no_grad()
    def timed(self, timestep: Tensor, module: Any = None) -> Cost:
        """Cost of a call of the UNet, or of a `module` made of it, at `latent`."""
        module = self.unet if module is None else module
        sample, keywords = self.inputs(self.latent, self.latent)
        return timed(lambda: module(sample, timestep, **keywords))

    def timesteps(self) -> Tensor:
        """Timesteps of a new generation."""
        return torch.linspace(981, 1, TIMESTEPS).long().to(self.device)


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
