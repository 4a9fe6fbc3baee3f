"""Time of one block of a transformer at its real width and number of tokens.

    python scripts/bench.py transformer                   every case in float32 and bfloat16
    python scripts/bench.py transformer --cases flux-4096 --dtypes bfloat16

A model of the real class and width, with one block and random weights, is called unmerged, with
each preset, and with the oracle of each preset, in turns and after the same checks as in `bench.py
unet`. Its embeddings and its output layer are timed with the block.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks import unet
from benchmarks.cases import QUICK
from benchmarks.options import add_common_options
from benchmarks.rows import append_rows, read_rows
from sd_tokenmerge.bench.calls import TIMESTEPS
from sd_tokenmerge.bench.contestants import preset_contestants
from sd_tokenmerge.bench.gate import require_sound
from sd_tokenmerge.bench.turns import Cost, timed

BENCHMARK, FILE = "transformer-block", "transformer.csv"

Draw = Callable[..., Tensor]
"""Draws random numbers of a shape."""
Keywords = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A transformer at a size.

    Attributes:
        model: name of its class in diffusers.
        config: of a model with one block.
        inputs: keyword arguments of a call, for (batch, height, width) in tokens.
        tokens: height and width of the picture in tokens. A video has `FRAMES` times as many.
    """

    model: str
    config: Keywords
    inputs: Callable[[Draw, int, int, int], Keywords]
    tokens: tuple[int, int]


FRAMES = 6
"""Latent frames of videos: 21 frames."""
SD3 = {
    "sample_size": 128,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 2,  # the second is removed: the last block of a model skips a part of its work
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
FLUX = {
    "in_channels": 64,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "axes_dims_rope": (16, 56, 56),
}
PIXART = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 1,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 4096,
    "norm_type": "ada_norm_single",
    "use_additional_conditions": False,
}
WAN = {
    "num_layers": 1,
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}


def sd3_inputs(draw: Draw, batch: int, height: int, width: int) -> Keywords:
    """With 77 tokens of CLIP and 256 of T5."""
    return {
        "hidden_states": draw(batch, 16, 2 * height, 2 * width),
        "encoder_hidden_states": draw(batch, 333, 4096),
        "pooled_projections": draw(batch, 2048),
    }


def flux_inputs(draw: Draw, batch: int, height: int, width: int) -> Keywords:
    """With 512 text tokens."""
    positions = torch.cartesian_prod(*map(torch.arange, (1, height, width)))
    return {
        "hidden_states": draw(batch, height * width, 64),
        "encoder_hidden_states": draw(batch, 512, 4096),
        "pooled_projections": draw(batch, 768),
        "img_ids": positions.float(),
        "txt_ids": torch.zeros(512, 3),
    }


def pixart_inputs(draw: Draw, batch: int, height: int, width: int) -> Keywords:
    """With 300 text tokens, in cross-attention."""
    return {
        "hidden_states": draw(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": draw(batch, 300, 4096),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def wan_inputs(draw: Draw, batch: int, height: int, width: int) -> Keywords:
    """With 512 text tokens, in cross-attention."""
    return {
        "hidden_states": draw(batch, 16, FRAMES, 2 * height, 2 * width),
        "encoder_hidden_states": draw(batch, 512, 4096),
    }


FLUX_DOUBLE = FLUX | {"num_layers": 1, "num_single_layers": 0}
FLUX_SINGLE = FLUX | {"num_layers": 0, "num_single_layers": 1}
TINY = PIXART | {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
CASES = {
    "sd3-4096": Case("SD3Transformer2DModel", SD3, sd3_inputs, (64, 64)),
    "flux-4096": Case("FluxTransformer2DModel", FLUX_DOUBLE, flux_inputs, (64, 64)),
    "flux-single-4096": Case("FluxTransformer2DModel", FLUX_SINGLE, flux_inputs, (64, 64)),
    "pixart-4096": Case("PixArtTransformer2DModel", PIXART, pixart_inputs, (64, 64)),
    "pixart-16384": Case("PixArtTransformer2DModel", PIXART, pixart_inputs, (128, 128)),
    "wan-9360": Case("WanTransformer3DModel", WAN, wan_inputs, (30, 52)),
    QUICK: Case("PixArtTransformer2DModel", TINY, pixart_inputs, (32, 32)),
}


class BlockCalls:
    """Calls of a transformer with one block, of the form of `bench.calls.Calls`.

    Attributes:
        denoiser: the transformer.
        batch: images per call.
        device: its device.
        dtype: its precision.
    """

    def __init__(self, case: Case, *, batch: int, device: str, dtype: str) -> None:
        """Build the model."""
        self._case, self.batch = case, batch
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        torch.manual_seed(0)
        with self.device:
            model = getattr(diffusers, case.model).from_config(case.config)
        if "SD3" in case.model:
            del model.transformer_blocks[1:]
        self.denoiser: Any = model.to(self.dtype).eval().requires_grad_(False)

    def timesteps(self) -> Tensor:
        """Timesteps of a new generation, as the model takes them."""
        most = 0.999 if "Flux" in self._case.model else 999.0
        return torch.linspace(most, most / 1000, TIMESTEPS, device=self.device)

    def call(self, timestep: Tensor, size: tuple[int, int]) -> Tensor:
        """Output for a picture of (height, width) tokens."""
        inputs = self._inputs(timestep, size)
        with torch.no_grad():
            output: Tensor = self.denoiser(**inputs)[0]
        return output

    @torch.no_grad()
    def timed(self, timestep: Tensor) -> Cost:
        """Cost of a call at the case's size."""
        inputs = self._inputs(timestep, self._case.tokens)
        return timed(lambda: self.denoiser(**inputs))

    def _inputs(self, timestep: Tensor, size: tuple[int, int]) -> Keywords:
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device, self.dtype)

        inputs = self._case.inputs(draw, self.batch, *size)
        for name in inputs.keys() & {"img_ids", "txt_ids"}:
            inputs[name] = inputs[name].to(self.device)
        # expanded, so that it stays an element of `timesteps`, as in a pipeline
        return inputs | {"timestep": timestep.expand(self.batch), "return_dict": False}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `bench.py transformer`."""
    known = [case for case in CASES if case != QUICK]
    parser.add_argument("--cases", nargs="+", choices=known, default=known)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, default=1, help="pictures per call")
    add_common_options(parser, minutes=40)


def run(arguments: argparse.Namespace) -> str:
    """Measure every case, store the rows, return the table."""
    contestants = [one for one in preset_contestants() if one.modification is None]
    seconds = arguments.minutes * 60 / (len(arguments.cases) * len(arguments.dtypes))
    rows = []
    for case in arguments.cases:
        for dtype in arguments.dtypes:
            options = {"device": arguments.device, "dtype": dtype}
            calls = BlockCalls(CASES[case], batch=arguments.batch, **options)
            require_sound(calls, contestants)
            print(f"{case}, {dtype}: checks passed", file=sys.stderr)
            found = unet.measure(BENCHMARK, calls, contestants, seconds, arguments.rounds)
            found = [{**row, "case": case} for row in found]
            if not arguments.quick:
                append_rows(arguments.out / FILE, unet.COLUMNS, found)
            rows += found
            del calls
            gc.collect()
    return unet.times_table(rows)


def block_times(folder: Path) -> str:
    """Times of one block: a table for each device and run."""
    return unet.times_table(read_rows(folder / FILE))
