"""CLIP and DINOv2 features through transformers; only safetensors weights are read.

CLIP: the projected image embedding (clean-fid's CLIP-FID; Kynkaanniemi et al., ICLR 2023).
DINOv2: the class token after the last norm (Stein et al., NeurIPS 2023).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sd_tokenmerge.fid.inception_weights import WeightsError
from sd_tokenmerge.files import file_sha256

CLIP_MODEL = "openai/clip-vit-large-patch14"
DINOV2_MODEL = "facebook/dinov2-large"
DINOV2_SIZE = 224  # as Stein et al.; position embeddings are interpolated


def find_model(model: str | os.PathLike[str], *, download: bool) -> Path:
    """Folder of a model's config and safetensors weights.

    Args:
        model: a folder, or an id on the Hugging Face hub.
        download: fetch it from the hub; otherwise only the local hub cache is searched.

    Raises:
        WeightsError: the model was not found, or has no safetensors weights.
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


def read_config(folder: Path, kind: str, *model_types: str) -> Any:
    """A model's transformers configuration.

    Args:
        folder: of the model.
        kind: name of the expected model in errors.
        model_types: the allowed values of `model_type`.

    Raises:
        WeightsError: the folder holds another kind of model.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in model_types:
        raise WeightsError(f"{str(folder)!r} must hold a {kind} model, got {config.model_type!r}.")
    return config


def clip_size_and_features(folder: Path) -> tuple[int, int]:
    """Input side in pixels and D of a CLIP model.

    Raises:
        WeightsError: the folder holds another kind of model.
    """
    config = read_config(folder, "CLIP", "clip", "clip_vision_model")
    vision = config.vision_config if config.model_type == "clip" else config
    return int(vision.image_size), int(config.projection_dim)


def load_clip(folder: Path) -> nn.Module:
    """Build the image encoder, in evaluation mode and float32."""
    from transformers import CLIPVisionModelWithProjection

    return _OneOutput(_load_strictly(CLIPVisionModelWithProjection, folder), "image_embeds")


def load_dinov2(folder: Path) -> nn.Module:
    """Build the network, in evaluation mode and float32."""
    from transformers import Dinov2Model

    return _OneOutput(_load_strictly(Dinov2Model, folder), "pooler_output")


class _OneOutput(nn.Module):
    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model = model
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = getattr(self.model(pixel_values=x), self.output)
        return features


def _load_strictly(model_class: Any, folder: Path) -> nn.Module:
    """Load weights; transformers alone would draw missing ones at random and only report it."""
    try:
        model, report = model_class.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True
        )
    except RuntimeError as error:
        raise WeightsError(f"{str(folder)!r} does not fit {model_class.__name__}.") from error
    lost = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
    if lost:
        raise WeightsError(
            f"{str(folder)!r} does not fit {model_class.__name__}: it lacks {len(lost)} "
            f"parameters, the first being {lost[0]}."
        )
    network: nn.Module = model
    return network.float().eval().requires_grad_(False)
