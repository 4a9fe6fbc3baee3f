"""Tiny REAL models: the diffusers classes of SD 1.5, SD 2.1 and SDXL, a tenth as wide.

Weights are random but seeded, structure is that of the published configurations (verified by
`tests/test_tiny_models.py` where those are at hand): block types, layers per block, heads by count
or per block, linear projections, added conditioning, scheduler and prediction type.
A forward of a 16x16 latent takes tens of milliseconds.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

CROSS_ATTENTION_DIM = 32

_COMMON_UNET: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "cross_attention_dim": CROSS_ATTENTION_DIM,
    "sample_size": 16,
}

UNET_CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {
        **_COMMON_UNET,
        "block_out_channels": [32, 64, 64, 64],
        "attention_head_dim": 8,  # a number of heads, despite the name
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    },
    "sd21": {
        **_COMMON_UNET,
        "block_out_channels": [32, 64, 64, 64],
        "attention_head_dim": [2, 4, 8, 8],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        **_COMMON_UNET,
        "block_out_channels": [32, 32, 64],
        "attention_head_dim": [1, 2, 4],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 3],
        "use_linear_projection": True,
        "upcast_attention": None,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + CROSS_ATTENTION_DIM // 2,
    },
}

_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@cache
def _unet(kind: str) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DConditionModel(**UNET_CONFIGS[kind]).eval().requires_grad_(False)


def tiny_unet(kind: str = "sd15") -> UNet2DConditionModel:
    """A fresh copy of the tiny UNet of `kind` (`"sd15"`, `"sd21"`, `"sdxl"`)."""
    return copy.deepcopy(_unet(kind))


def unet_inputs(
    kind: str = "sd15",
    batch: int = 2,
    height: int = 16,
    width: int = 16,
    timestep: int = 500,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Keyword arguments of one UNet call; image i is the same in every batch."""
    images, texts = [], []
    for index in range(batch):
        generator = torch.Generator().manual_seed(index)
        images.append(torch.randn(4, height, width, generator=generator))
        texts.append(torch.randn(77, CROSS_ATTENTION_DIM, generator=generator))
    inputs: dict[str, Any] = {
        "sample": torch.stack(images).to(dtype),
        "timestep": torch.tensor(timestep),
        "encoder_hidden_states": torch.stack(texts).to(dtype),
    }
    if kind == "sdxl":
        pooled = torch.linspace(-1, 1, CROSS_ATTENTION_DIM // 2).expand(batch, -1)
        sizes = torch.tensor([[128, 128, 0, 0, 128, 128]]).expand(batch, -1)
        inputs["added_cond_kwargs"] = {"text_embeds": pooled.to(dtype), "time_ids": sizes.to(dtype)}
    return inputs


@torch.no_grad()
def call_unet(unet: Any, kind: str = "sd15", **options: Any) -> torch.Tensor:
    """One UNet call on `unet_inputs(kind, **options)`."""
    return unet(**unet_inputs(kind, **options), return_dict=False)[0]


@cache
def tiny_vae(**changes: Any) -> AutoencoderKL:
    """An autoencoder with 4 channels and 8 pixels per latent."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return AutoencoderKL(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=128,
            **changes,
        ).eval()


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows single bytes, each alone and at the end of a word; no merges."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [256 + i for i in range(256 - len(printable))]  # CLIP's stand-ins for the other bytes
    symbols = [chr(code) for code in printable + shifted]
    words = symbols + [symbol + "</w>" for symbol in symbols]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    with TemporaryDirectory() as folder:  # transformers before 5 takes files only
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocab))
        merges_file.write_text("#version: 0.2\n")
        return CLIPTokenizer(str(vocab_file), str(merges_file), model_max_length=77)


def text_config(**changes: Any) -> CLIPTextConfig:
    """The configuration of a tiny CLIP text encoder."""
    return CLIPTextConfig(
        **{
            "vocab_size": 514,
            "bos_token_id": 512,
            "eos_token_id": 513,
            "pad_token_id": 513,
            "hidden_size": CROSS_ATTENTION_DIM,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 77,
            **changes,
        }
    )


def _text_encoder() -> CLIPTextModel:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return CLIPTextModel(text_config()).eval()


def _stable_diffusion(kind: str, scheduler: Any) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=copy.deepcopy(tiny_vae()),
        text_encoder=_text_encoder(),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(kind),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_sd15() -> StableDiffusionPipeline:
    """SD 1.5: self-attention at three levels and in the middle, 8 heads, PNDM; 128 px."""
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **_SCHEDULE)
    return _stable_diffusion("sd15", scheduler)


def tiny_sd21() -> StableDiffusionPipeline:
    """SD 2.1: linear projections, heads per block, v-prediction with DDIM; 128 px."""
    scheduler = DDIMScheduler(
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        **_SCHEDULE,
    )
    return _stable_diffusion("sd21", scheduler)


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """SDXL: no attention at level 0, deeper transformers, text_time conditioning; 128 px."""
    half = CROSS_ATTENTION_DIM // 2
    with torch.random.fork_rng():
        torch.manual_seed(3)
        text_encoder = CLIPTextModel(text_config(hidden_size=half)).eval()
        text_encoder_2 = CLIPTextModelWithProjection(
            text_config(hidden_size=half, projection_dim=half)
        ).eval()
    pipe = StableDiffusionXLPipeline(
        vae=copy.deepcopy(tiny_vae()),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet("sdxl"),
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **_SCHEDULE),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
