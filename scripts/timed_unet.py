"""UNets of real architectures with random weights, and timed calls of them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

TIMESTEPS = 50
"""Entries of the scheduler's `timesteps` that the calls pretend to come from."""


@dataclass(frozen=True)
class Case:
    """A UNet at a size."""

    config: str
    pixels: int
    batch: int = 2

    @property
    def latent(self) -> int:
        """Height and width of the latents."""
        return self.pixels // 8


CASES = {
    "sd15-512": Case("stable-diffusion-v1-5", 512),
    "sd15-768": Case("stable-diffusion-v1-5", 768),
    "sd15-1024": Case("stable-diffusion-v1-5", 1024),
    "sd15-1536": Case("stable-diffusion-v1-5", 1536),
    "sd21-768": Case("stable-diffusion-2-1", 768),
    "sdxl-1024": Case("stable-diffusion-xl-base-1.0", 1024),
}
QUICK = "quick"
"""The case of a UNet that is made, and run, in a moment: does a script run?"""
QUICK_LATENT = 32
QUICK_CONFIG = {
    "in_channels": 4,
    "out_channels": 4,
    "sample_size": 32,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command line say where the configurations are, and on what the model runs."""
    configs = Path(__file__).resolve().parents[2] / "shared" / "model-configs"
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--configs", type=Path, default=configs)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", default="float16" if on_gpu else "float32")


class TimedUNet:
    """A UNet with random weights (time does not depend on them), and its calls.

    Attributes:
        unet: the model.
        device: it is on.
        dtype: it computes in.
        latent: height and width of the latents in timed calls.
        batch: images per call.
    """

    def __init__(
        self, config: dict[str, Any], latent: int, batch: int, device: str, dtype: str
    ) -> None:
        """Build the model."""
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.latent = latent
        self.batch = batch
        torch.manual_seed(0)
        with self.device:
            self.unet = UNet2DConditionModel.from_config(config).to(self.dtype).eval()

    def inputs(self, height: int, width: int) -> tuple[Tensor, dict[str, Any]]:
        """The sample and the keyword arguments of a call; the timestep is missing."""
        generator = torch.Generator().manual_seed(1)
        config = self.unet.config

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        keywords: dict[str, Any] = {
            "encoder_hidden_states": draw(self.batch, 77, config.cross_attention_dim)
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
    def call(self, timestep: Tensor, height: int, width: int, module: Any = None) -> Tensor:
        """One call of the UNet, or of a `module` made of it."""
        sample, keywords = self.inputs(height, width)
        module = self.unet if module is None else module
        output: Tensor = module(sample, timestep, **keywords, return_dict=False)[0]
        return output

    @torch.no_grad()
    def timed(self, timestep: Tensor, module: Any = None) -> float:
        """Seconds of one call of the UNet, or of a `module` made of it, at the case's size."""
        sample, keywords = self.inputs(self.latent, self.latent)
        module = self.unet if module is None else module
        self.synchronize()
        start = time.perf_counter()
        module(sample, timestep, **keywords, return_dict=False)
        self.synchronize()
        return time.perf_counter() - start

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timesteps(self) -> Tensor:
        """Those of a new generation."""
        return torch.linspace(981, 1, TIMESTEPS).long().to(self.device)


def build_unet(case: str, arguments: argparse.Namespace) -> TimedUNet:
    """The UNet of a case.

    Args:
        case: one of `CASES`, or `QUICK`.
        arguments: of `add_model_arguments`, and `batch`, without which the case says it.

    Raises:
        SystemExit: its configuration is not there.
    """
    config, latent, batch = QUICK_CONFIG, QUICK_LATENT, 2
    if case != QUICK:
        one = CASES[case]
        config, latent, batch = read_config(arguments.configs, one.config), one.latent, one.batch
    return TimedUNet(config, latent, arguments.batch or batch, arguments.device, arguments.dtype)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A model's UNet configuration.

    Raises:
        SystemExit: it is not there.
    """
    path = folder / name / "unet" / "config.json"
    if not path.is_file():
        sys.exit(f"{path} is missing: name a folder of diffusers configurations by --configs.")
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def milliseconds(seconds: float) -> str:
    """Milliseconds, to a tenth below a second."""
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.1f}"
