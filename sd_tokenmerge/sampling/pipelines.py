"""Which pipelines the commands work with, decided by configurations, before weights are read."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers

from sd_tokenmerge.files import read_json_object
from sd_tokenmerge.patching.families import require_image_denoiser
from sd_tokenmerge.sampling.component_config import require_config
from sd_tokenmerge.sampling.locate import locate_model, read_model_index
from sd_tokenmerge.sampling.options import ResolvedOptions

TRANSFORMER_PIPELINES = (
    "AuraFlowPipeline",
    "FluxPipeline",
    "HunyuanDiTPipeline",
    "Lumina2Pipeline",
    "PixArtAlphaPipeline",
    "PixArtSigmaPipeline",
    "QwenImagePipeline",
    "StableDiffusion3Pipeline",
)
"""The supported pipelines without a UNet."""

_OPTIONAL_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
_ATTENTION_OF_UNETS = ("eager", "sliced", "xformers")


def require_pipeline(index: dict[str, Any], path: Path, options: ResolvedOptions) -> None:
    """Refuse unsupported pipelines, options that they lack, and missing or damaged components.

    Args:
        index: the pipeline's `model_index.json`.
        path: its folder.
        options: of the model.

    Raises:
        ValueError: one of these was found.
    """
    name = index.get("_class_name")
    cls: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(cls, type):
        raise ValueError(
            f"`model` must be a pipeline of diffusers {diffusers.__version__}, got {name!r} in "
            f"{path / 'model_index.json'}."
        )
    parts = {
        part: entry
        for part, entry in index.items()
        if isinstance(entry, list) and None not in entry and part not in _OPTIONAL_PARTS
    }
    for part, entry in parts.items():
        if not (path / part).is_dir():
            raise ValueError(f"`model` must hold a folder {part!r}, got {str(path)!r} without it.")
        for file in ("config.json", "scheduler_config.json"):
            if (config := path / part / file).exists():
                require_config(_diffusers_class(entry), config)
    slot = next((slot for slot in ("unet", "transformer") if slot in parts), None)
    if slot is None:
        raise ValueError(
            f"`model` must be a pipeline with a UNet or a transformer, got a {name} without."
        )
    require_image_denoiser(slot, read_json_object(path / slot / "config.json"), options.model)
    if slot == "transformer":
        _require_transformer_pipeline(name, options)
    elif "image" in inspect.signature(cls.__call__).parameters:
        raise ValueError(
            f"`model` must be a text-to-image pipeline, got {name}, which starts from an image."
        )
    if options.lora and not hasattr(cls, "load_lora_weights"):
        raise ValueError(f"`lora` must not be given: {name} cannot load any.")


def _require_transformer_pipeline(name: Any, options: ResolvedOptions) -> None:
    if name not in TRANSFORMER_PIPELINES:
        raise ValueError(
            f"`model` must be a pipeline with a UNet, or {', '.join(TRANSFORMER_PIPELINES[:-1])} "
            f"or {TRANSFORMER_PIPELINES[-1]}, got {name}."
        )
    if options.attention_backend in _ATTENTION_OF_UNETS:
        raise ValueError(
            "`attention_backend` must be default, flash, efficient or math for a transformer, got "
            f"{options.attention_backend!r}."
        )


def _diffusers_class(entry: list[Any]) -> Any:
    """The class that an entry of a `model_index.json` names, or None if it is not diffusers'."""
    is_pair = len(entry) == 2 and entry[0] == "diffusers" and isinstance(entry[1], str)
    return getattr(diffusers, entry[1], None) if is_pair else None


def has_unet(options: ResolvedOptions) -> bool:
    """Whether the model's denoiser is a UNet.

    Raises:
        ValueError: there is no such model, or it is damaged.
    """
    path = locate_model(options)
    return path.is_file() or "unet" in read_model_index(path)
