"""Timed calls of a UNet on random inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sd_tokenmerge.bench.calls import TIMESTEPS
from sd_tokenmerge.bench.turns import Cost, timed


class UNetCalls:
    """Calls of a UNet on random inputs.

    Attributes:
        denoiser: the UNet.
        device: its device.
        dtype: its precision.
        latent: height and width of the latents in timed calls.
        batch: images per call.
    """

    def __init__(self, unet: Any, *, latent: int, batch: int):
        """Prepare calls of `unet`, an (S)DXL or Stable Diffusion 1 or 2 `UNet2DConditionModel`."""
        self.denoiser, self.latent, self.batch = unet, latent, batch
        self.device: torch.device = unet.device
        self.dtype: torch.dtype = unet.dtype

    def inputs(self, height: int, width: int) -> tuple[Tensor, dict[str, Any]]:
        """Sample and keyword arguments of a call, without the timestep."""
        generator = torch.Generator().manual_seed(1)
        config = self.denoiser.config

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
        module = self.denoiser if module is None else module
        sample, keywords = self.inputs(*size)
        output: Tensor = module(sample, timestep, **keywords)[0]
        return output

    @torch.no_grad()
    def timed(self, timestep: Tensor, module: Any = None) -> Cost:
        """Cost of a call of the UNet, or of a `module` made of it, at `latent`."""
        module = self.denoiser if module is None else module
        sample, keywords = self.inputs(self.latent, self.latent)
        return timed(lambda: module(sample, timestep, **keywords))

    def timesteps(self) -> Tensor:
        """Timesteps of a new generation."""
        return torch.linspace(981, 1, TIMESTEPS).long().to(self.device)
