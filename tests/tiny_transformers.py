"""Transformers of diffusers' own classes, tiny and with random weights, and calls of them.

Every model has 8 x 6 image tokens (Wan and CogVideoX: two frames of 4 x 6), and 5 text tokens (512
for image to video).
"""

from __future__ import annotations

import inspect

import diffusers
import torch
from torch import nn

HEIGHT, WIDTH, TEXT = 8, 6, 5
HEADS, DIM = 2, 16
CHANNELS = HEADS * DIM


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def auraflow():
    config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 24,
        "caption_projection_dim": CHANNELS,
        "pos_embed_max_size": 1024,
    }
    return diffusers.AuraFlowTransformer2DModel, config, image_inputs(4) | fractional()


def cogvideox():
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": 24,
        "num_layers": 2,
        "sample_width": 12,
        "sample_height": 8,
        "sample_frames": 5,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": TEXT,
    }
    inputs = image_inputs(4) | {"hidden_states": draw(2, 2, 4, HEIGHT, 2 * WIDTH)}
    return diffusers.CogVideoXTransformer3DModel, config, inputs


def flux():
    config = {
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 8,
        "axes_dims_rope": [4, 6, 6],
    }
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    positions = torch.stack((torch.zeros(HEIGHT, WIDTH), rows, columns), -1).reshape(-1, 3)
    inputs = image_inputs(4) | fractional()
    inputs |= {
        "hidden_states": draw(2, HEIGHT * WIDTH, 4),
        "pooled_projections": draw(2, 8, seed=2),
        "img_ids": positions.float(),
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return diffusers.FluxTransformer2DModel, config, inputs


def flux2():
    config = {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 24,
        "timestep_guidance_channels": 8,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    _, _, inputs = flux()
    del inputs["pooled_projections"]
    inputs |= {
        "img_ids": nn.functional.pad(inputs["img_ids"], (0, 1)).expand(2, -1, -1),
        "txt_ids": torch.zeros(2, TEXT, 4),
        "guidance": torch.ones(2),
    }
    return diffusers.Flux2Transformer2DModel, config, inputs


def hunyuandit():
    config = {
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "hidden_size": CHANNELS,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 16,
        "num_layers": 4,
        "cross_attention_dim": 8,
        "cross_attention_dim_t5": 8,
        "pooled_projection_dim": 4,
        "text_len": TEXT,
        "text_len_t5": TEXT,
        "activation_fn": "gelu-approximate",
    }
    rotary = [draw(HEIGHT * WIDTH, DIM, seed=seed) for seed in (3, 4)]
    inputs = image_inputs(4) | {
        "encoder_hidden_states": draw(2, TEXT, 8, seed=1),
        "text_embedding_mask": torch.ones(2, TEXT),
        "encoder_hidden_states_t5": draw(2, TEXT, 8, seed=2),
        "text_embedding_mask_t5": torch.ones(2, TEXT),
        "timestep": torch.tensor([500.0, 500.0]),
        "image_meta_size": torch.ones(2, 6),
        "style": torch.zeros(2, dtype=torch.int64),
        "image_rotary_emb": rotary,
    }
    return diffusers.HunyuanDiT2DModel, config, inputs


def lumina2():
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "hidden_size": CHANNELS,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": HEADS,
        "num_kv_heads": 1,
        "multiple_of": 16,
        "axes_dim_rope": (4, 6, 6),
        "axes_lens": (16, 16, 16),
        "cap_feat_dim": 24,
    }
    inputs = image_inputs(4) | fractional() | {"encoder_attention_mask": text_mask()}
    return diffusers.Lumina2Transformer2DModel, config, inputs


def pixart():
    config = {
        "sample_size": 16,
        "num_layers": 2,
        "patch_size": 2,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "in_channels": 4,
        "cross_attention_dim": CHANNELS,
        "caption_channels": 24,
        "norm_type": "ada_norm_single",
        "use_additional_conditions": False,
    }
    inputs = image_inputs(4) | {
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return diffusers.PixArtTransformer2DModel, config, inputs


def qwen_image():
    config = {
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 6, 6),
    }
    inputs = image_inputs(4) | fractional()
    inputs |= {
        "hidden_states": draw(2, HEIGHT * WIDTH, 16),
        "encoder_hidden_states_mask": text_mask(),
        "img_shapes": [[(1, HEIGHT, WIDTH)]] * 2,
    }
    model = diffusers.QwenImageTransformer2DModel
    if "txt_seq_lens" in inspect.signature(model.forward).parameters:  # older versions of diffusers
        inputs["txt_seq_lens"] = [TEXT, TEXT]
    return model, config, inputs


def sd3():
    config = {
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 2,
        "attention_head_dim": DIM,
        "num_attention_heads": HEADS,
        "joint_attention_dim": 24,
        "caption_projection_dim": CHANNELS,
        "pooled_projection_dim": 8,
        "out_channels": 4,
        "pos_embed_max_size": 32,
    }
    inputs = image_inputs(4) | {"pooled_projections": draw(2, 8, seed=2)}
    return diffusers.SD3Transformer2DModel, config, inputs


def sd35():
    model, config, inputs = sd3()
    return model, config | {"dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}, inputs


def wan():
    config = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": HEADS,
        "attention_head_dim": DIM,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 24,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 32,
    }
    inputs = image_inputs(4) | {"hidden_states": draw(2, 4, 2, HEIGHT, 2 * WIDTH)}
    return diffusers.WanTransformer3DModel, config, inputs


def wan_of_images():
    """Image to video: its cross-attention is called for the text and for an image."""
    model, config, inputs = wan()
    inputs |= {
        "encoder_hidden_states": draw(2, 512, 24, seed=1),
        "encoder_hidden_states_image": draw(2, 257, 16, seed=2),
    }
    return model, config | {"image_dim": 16, "added_kv_proj_dim": CHANNELS}, inputs


def image_inputs(channels):
    return {
        "hidden_states": draw(2, channels, 2 * HEIGHT, 2 * WIDTH),
        "encoder_hidden_states": draw(2, TEXT, 24, seed=1),
        "timestep": torch.tensor([500, 500]),
        "return_dict": False,
    }


def text_mask():
    """The second text is shorter."""
    mask = torch.ones(2, TEXT, dtype=torch.int64)
    mask[1, 3:] = 0
    return mask


def fractional():
    return {"timestep": torch.tensor([0.5, 0.5])}


FAMILIES = {
    entry.__name__: entry
    for entry in (
        auraflow,
        cogvideox,
        flux,
        hunyuandit,
        lumina2,
        pixart,
        qwen_image,
        sd3,
        sd35,
        wan,
        wan_of_images,
    )
}
if hasattr(diffusers, "Flux2Transformer2DModel"):  # since 0.36
    FAMILIES["flux2"] = flux2


def tiny_transformer(name, **changes):
    kind, config, _ = FAMILIES[name]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(**config | changes).eval().requires_grad_(False)
        for parameter in model.parameters():  # some initialise gates and outputs to zero
            if parameter.abs().max() == 0:
                parameter.copy_(0.1 * torch.randn(parameter.shape))
        for attention in model.modules():  # random weights attend almost evenly
            if hasattr(attention, "to_q"):
                for layer in (attention.to_q, attention.to_k, attention.to_v):
                    layer.weight.mul_(4)
            elif hasattr(attention, "to_qkv_mlp_proj"):
                attention.to_qkv_mlp_proj.weight[: 3 * CHANNELS].mul_(4)
    return model


def inputs_of(name):
    return FAMILIES[name]()[2]


@torch.no_grad()
def call_transformer(model, name, **changes):
    return model(**(inputs_of(name) | changes))[0]
