"""Last stage: the trained parts as a `StableDiffusionPipeline` folder in half precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from sample_world import CLASSES
from transformers import CLIPTokenizer

from sample_training.denoiser import Denoiser, build_scheduler

SETTINGS = {"classes": list(CLASSES), "size": 256, "steps": 25, "guidance_scale": 3.0}
"""Intended settings of the sample pipeline, for `sample.json` beside the weights."""


def export_pipeline(
    autoencoder: AutoencoderTiny,
    denoiser: Denoiser,
    tokenizer: CLIPTokenizer,
    tokenizer_folder: Path,
    scaling: float,
    folder: Path,
) -> None:
    """Write the pipeline folder, replacing an existing one."""
    autoencoder.register_to_config(scaling_factor=scaling)
    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer,
        unet=denoiser.unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.vae.to(torch.float16)
    pipe.unet.to(
        torch.float16
    )  # the tiny text encoder stays float32: transformers keeps file dtypes
    pipe.save_pretrained(partial)
    _drop_unread_config(partial / "vae" / "config.json", "block_out_channels")
    name_text_weights(partial / "text_encoder" / "model.safetensors")
    for name in ("vocab.json", "merges.txt"):  # files that transformers before 5 reads
        shutil.copy(tokenizer_folder / name, partial / "tokenizer" / name)
    (partial / "sample.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def name_text_weights(path: Path) -> None:
    """Name the text encoder's weights as in published models, which every transformers reads.

    transformers 5 saves them without the prefix `text_model.`, and transformers 4 would then start
    from random weights.
    """
    prefix = "text_model."
    weights = {prefix + name.removeprefix(prefix): value for name, value in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def _drop_unread_config(path: Path, name: str) -> None:
    """Remove an entry that diffusers writes, and warns of when it reads it."""
    config = json.loads(path.read_text())
    del config[name]
    path.write_text(json.dumps(config, indent=2) + "\n")
