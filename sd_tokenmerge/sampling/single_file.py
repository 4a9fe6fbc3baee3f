"""Single-file checkpoints: what kind they are, told by names and shapes of their tensors."""

from __future__ import annotations

from pathlib import Path
from zipfile import is_zipfile

import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import safe_open
from torch import Tensor


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
