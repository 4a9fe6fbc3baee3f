"""UNets of real architectures with random weights, and timed calls of them.

Imports nothing from sd_tokenmerge, so that it works with any commit of it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from benchmarks.turns import Cost, timed

TIMESTEPS = 50
"""Length of the `timesteps` from which the calls take theirs."""

SD15 = {"cross_attention_dim": 768}
SD21 = {
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY = {
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "pipeline" / "unet" / "config.json"


@dataclass(frozen=True)
class Case:
    """A UNet at a size: its configuration, and the picture's side in pixels."""

    config: dict[str, Any] | Path
    pixels: int

    @property
    def latent(self) -> int:
        """Height and width of the latents."""
        return self.pixels // 8


QUICK = "quick"
"""A tiny case, to try whether a benchmark runs."""
CASES = {
    "sd15-512": Case(SD15, 512),
    "sd15-768": Case(SD15, 768),
    "sd15-1024": Case(SD15, 1024),
    "sd21-768": Case(SD21, 768),
    "sdxl-1024": Case(SDXL, 1024),
    "sample-512": Case(SAMPLE, 512),
    QUICK: Case(TINY, 256),
}


class UNetCalls:
    """A UNet with random weights (time does not depend on them), and calls of it.

    Attributes:
        unet: the model.
        device: its device.
        dtype: its precision.
        latent: height and width of the latents in timed calls.
        batch: images per call.
    """

    def __init__(self, case: str, *, batch: int = 2, device: str = "cpu", dtype: str = "float32"):
        """Build the UNet of one of `CASES`."""
        config, self.latent, self.batch = CASES[case].config, CASES[case].latent, batch
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        if isinstance(config, Path):
            config = json.loads(config.read_text(encoding="utf-8"))
        torch.manual_seed(0)
        with self.device:
            self.unet = UNet2DConditionModel.from_config(config).to(self.dtype).eval()

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
            pooled = config.projection_class_embeddings_input_dim - 6 * 256
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
        """Cost of a call of the UNet, or of a `module` made of it, at the case's size."""
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


def timed_step(calls: Any, refresh_every: int) -> tuple[Cost, list[Cost]]:
    """Cost per denoising step over the life of a partition, and its components.

    Args:
        calls: `UNetCalls`, or `SelfAttentionCalls`.
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
