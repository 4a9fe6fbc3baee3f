"""Write a tiny SD 1.5 as a single-file checkpoint, under the names of the original code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
}


def save_single_file(pipe: Any, path: Path) -> None:
    """Save UNet, autoencoder and text encoder of a tiny SD 1.5 in one .safetensors file."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in pipe.unet.state_dict().items():
        tensors["model.diffusion_model." + unet_name(name)] = tensor.contiguous()
    for name, tensor in pipe.vae.state_dict().items():
        is_projection = "attentions" in name and tensor.ndim == 2
        tensor = tensor[:, :, None, None] if is_projection else tensor
        blocks = len(pipe.vae.config.block_out_channels)
        tensors["first_stage_model." + vae_name(name, blocks)] = tensor.contiguous()
    for name, tensor in pipe.text_encoder.state_dict().items():
        name = name if name.startswith("text_model.") else "text_model." + name
        tensors["cond_stage_model.transformer." + name] = tensor.contiguous()
    save_file(tensors, path)


def unet_name(name: str) -> str:
    """The original name of a UNet's tensor, for two layers per block."""
    for end, original in _ENDS.items():
        if name.startswith(end + "."):
            return original + name.removeprefix(end)
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if match is None:
        middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name)
        assert middle is not None
        place = 1 if middle[1] == "attentions" else 2 * int(middle[2])
        return f"middle_block.{place}.{_layer(middle[1], middle[3])}"
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.{1 if block == 0 else 2}.{rest}"
    number = 3 * block + index + (side == "down")
    where = "input_blocks" if side == "down" else "output_blocks"
    return f"{where}.{number}.{int(kind == 'attentions')}.{_layer(kind, rest)}"


def vae_name(name: str, blocks: int) -> str:
    """The original name of an autoencoder's tensor."""
    for ours, original in _VAE.items():
        name = name.replace(ours, original)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)

    def up(match: re.Match[str]) -> str:
        return f"up.{blocks - 1 - int(match[1])}."

    name = re.sub(r"up_blocks\.(\d+)\.", up, name)
    return name.replace("upsamplers.0", "upsample").replace("resnets", "block")


def _layer(kind: str, rest: str) -> str:
    if kind == "attentions":
        return rest
    layer, _, parameter = rest.partition(".")
    return f"{_RESNET[layer]}.{parameter}"
