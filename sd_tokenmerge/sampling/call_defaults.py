"""What diffusers' own calls of transformer pipelines do by default, read from configurations."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers

from sd_tokenmerge.hub import is_hub_id, read_config
from sd_tokenmerge.patching.outline import read_vae_scale_factor
from sd_tokenmerge.sampling.pipelines import TRANSFORMER_PIPELINES


def call_defaults(
    model: str, *, revision: str | None = None, local_files_only: bool = False
) -> dict[str, Any]:
    """Options that a transformer pipeline's own call has defaults for; no weights are read.

    Args:
        model: diffusers folder, hub id or single-file checkpoint.
        revision: of a hub id.
        local_files_only: never access the hub.

    Returns:
        `height`, `width`, `steps` and `guidance_scale`; empty if `model` is none of
        `TRANSFORMER_PIPELINES`.

    Raises:
        ValueError: a configuration is missing or damaged, or the hub cannot be reached.
    """
    if not is_hub_id(model) and not (Path(model).expanduser() / "model_index.json").is_file():
        return {}

    def read(file: str) -> dict[str, Any]:
        _, content = read_config(
            model, (file,), revision=revision, local_files_only=local_files_only
        )
        return content

    name = read("model_index.json").get("_class_name")
    pipeline: Any = getattr(diffusers, name, None) if name in TRANSFORMER_PIPELINES else None
    if pipeline is None:
        return {}
    parameters = inspect.signature(pipeline.__call__).parameters
    config = read("transformer/config.json")
    size = config.get("sample_size", 128)  # as in the pipelines of models whose size is free
    if type(size) is not int:
        raise ValueError(f"`sample_size` in {model}/transformer must be an integer, got {size!r}.")
    pixels = size * read_vae_scale_factor(model, revision, local_files_only)
    return {
        "height": parameters["height"].default or pixels,
        "width": parameters["width"].default or pixels,
        "steps": parameters["num_inference_steps"].default,
        "guidance_scale": parameters[guidance_argument(parameters, config)].default,
    }


def guidance_argument(accepted: Collection[str], config: Mapping[str, Any]) -> str:
    """The pipeline's argument for the guidance scale.

    Flux and Qwen-Image take the scale of classifier-free guidance as `true_cfg_scale`. Their
    `guidance_scale` is an input of distilled models, which need no classifier-free guidance.

    Args:
        accepted: names of the arguments of the pipeline's call.
        config: of the denoiser.
    """
    is_true = "true_cfg_scale" in accepted and not config.get("guidance_embeds")
    return "true_cfg_scale" if is_true else "guidance_scale"
