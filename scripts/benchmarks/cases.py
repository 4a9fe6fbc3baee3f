"""UNets of real architectures with random weights; time does not depend on the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from benchmarks.unet_calls import UNetCalls

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


def build(case: str, *, batch: int = 2, device: str = "cpu", dtype: str = "float32") -> UNetCalls:
    """Calls of the UNet of one of `CASES`."""
    config = CASES[case].config
    if isinstance(config, Path):
        config = json.loads(config.read_text(encoding="utf-8"))
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel.from_config(config).to(getattr(torch, dtype)).eval()
    return UNetCalls(unet, latent=CASES[case].latent, batch=batch)
