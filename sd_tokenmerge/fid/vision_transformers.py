"""CLIP and DINOv2 features through transformers.

CLIP: the projected image embedding (clean-fid's CLIP-FID, Kynkaanniemi et al., ICLR 2023). DINOv2:
    the
class token after the last norm (Stein et al., NeurIPS 2023). Only safetensors weights are read.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sd_tokenmerge.fid.inception_weights import WeightsError
from sd_tokenmerge.files import file_sha256

CLIP_MODEL = "openai/clip-vit-large-patch14"
DINOV2_MODEL = "facebook/dinov2-large"
DINOV2_SIZE = 224  # as Stein et al.; position embeddings are interpolated
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def find_model(model: str | os.PathLike[str], *, download: bool) -> Path:
    """Folder of a model's config and safetensors weights.

    Args:
        model: a folder, or an id on the Hugging Face hub.
        download: fetch it from the hub; otherwise only the local hub cache is searched.

    Raises:
        WeightsError: it is not there, or has no safetensors weights.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    os.fspath(model),
                    allow_patterns=["config.json", "*.safetensors"],
                    local_files_only=not download,
                )
            )
        except (OSError, ValueError) as error:
            raise WeightsError(
                f"The model {os.fspath(model)!r} was not found: name its folder with `weights`, or "
                "let `download_weights` fetch it from the Hugging Face hub."
            ) from error
    if not (folder / "config.json").is_file() or not list(folder.glob("*.safetensors")):
        raise WeightsError(f"{str(folder)!r} must hold config.json and safetensors weights.")
    return folder


def model_sha256(folder: Path) -> str:
    """One digest of the config and all weight files."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


class _CLIPFeatures(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import CLIPModel, CLIPVisionModelWithProjection

        whole = _config(folder).model_type == "clip"
        model = _load_strictly(CLIPModel if whole else CLIPVisionModelWithProjection, folder)
        self.vision_model = model.vision_model
        self.visual_projection = model.visual_projection

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.visual_projection(self.vision_model(pixel_values=x).pooler_output)
        return features


class _DINOv2Features(nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        from transformers import Dinov2Model

        self.model = _load_strictly(Dinov2Model, folder)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.model(pixel_values=x).pooler_output
        return features


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def _load_strictly(model_class: Any, folder: Path) -> Any:
    """Load weights; transformers alone would draw missing ones at random and only report it."""
    try:
        model, report = model_class.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    except RuntimeError as error:
        raise WeightsError(f"{str(folder)!r} does not fit {model_class.__name__}.") from error
    lost = [str(key) for key in (*report["missing_keys"], *report["mismatched_keys"])]
    if lost:
        raise WeightsError(
            f"{str(folder)!r} does not fit {model_class.__name__}: it lacks {len(lost)} "
            f"parameters, the first being {sorted(lost)[0]}."
        )
    return model


def clip_size_and_features(folder: Path) -> tuple[int, int]:
    """Input side in pixels and D of a CLIP model.

    Raises:
        WeightsError: the folder holds another kind of model.
    """
    config = _config(folder)
    if config.model_type not in ("clip", "clip_vision_model"):
        raise WeightsError(f"{str(folder)!r} must hold a CLIP model, got {config.model_type!r}.")
    vision = config.vision_config if config.model_type == "clip" else config
    return int(vision.image_size), int(config.projection_dim)


def dinov2_features(folder: Path) -> int:
    """D of a DINOv2 model.

    Raises:
        WeightsError: the folder holds another kind of model.
    """
    config = _config(folder)
    if config.model_type != "dinov2":
        raise WeightsError(f"{str(folder)!r} must hold a DINOv2 model, got {config.model_type!r}.")
    return int(config.hidden_size)


def load_clip(folder: Path) -> nn.Module:
    """Build the network, in evaluation mode and float32."""
    return _CLIPFeatures(folder).float().eval().requires_grad_(False)


def load_dinov2(folder: Path) -> nn.Module:
    """Build the network, in evaluation mode and float32."""
    return _DINOv2Features(folder).float().eval().requires_grad_(False)


def _standardize(
    mean: tuple[float, float, float], std: tuple[float, float, float], pixels: Tensor
) -> Tensor:
    means, stds = (
        torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (mean, std)
    )
    return (pixels / 255 - means) / stds


standardize_clip = partial(_standardize, _CLIP_MEAN, _CLIP_STD)
standardize_imagenet = partial(_standardize, _IMAGENET_MEAN, _IMAGENET_STD)
