"""Single-file checkpoints: what kind they are, told by names and shapes of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal
from zipfile import is_zipfile

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    fetch_diffusers_config,
)
from safetensors import safe_open
from torch import Tensor, nn

_CONVERTERS: dict[str, tuple[str, Any]] = {
    "unet": ("model.diffusion_model.", convert_ldm_unet_checkpoint),
    "vae": ("first_stage_model.", convert_ldm_vae_checkpoint),
}


def _tensors(path: Path) -> dict[str, Tensor]:
    """A checkpoint's tensors by name, with their shapes but without their values."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            shapes = {name: file.get_slice(name).get_shape() for name in names}
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
    tensors = content.get("state_dict", content)
    return {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in tensors.items()
        if isinstance(tensor, Tensor)
    }


def holds_sdxl(path: Path) -> bool:
    """Whether a checkpoint is one of SDXL, which has two text encoders."""
    return any(name.startswith("conditioner.embedders.1.") for name in _tensors(path))


def published_model(path: Path) -> str:
    """The hub id of the model that diffusers takes a checkpoint's configurations from."""
    return str(fetch_diffusers_config(_tensors(path))["pretrained_model_name_or_path"])


def missing_weights(path: Path, slot: Literal["unet", "vae"], network: nn.Module) -> list[str]:
    """Names of a network's weights that a checkpoint lacks.

    Args:
        path: the checkpoint; if it has no such network under the original names, none are named.
        slot: the network's place in the pipeline.
        network: with the checkpoint's configuration, on the meta device.
    """
    prefix, convert = _CONVERTERS[slot]
    tensors = _tensors(path)
    if not any(name.startswith(prefix) for name in tensors):
        return []
    try:
        converted = convert(tensors, network.config)
    except KeyError as error:  # a bias; its weight is there
        return [str(error.args[0])]
    return [name for name in network.state_dict() if converted.get(name) is None]
