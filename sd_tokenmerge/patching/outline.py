"""A model's UNet without its weights, and what a patch would merge in it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.files import read_json_object
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.partitions import clusters_to_keep
from sd_tokenmerge.patching.sites import find_sites, level_grid, native_latent_size
from sd_tokenmerge.patching.targets import choose_targets, require_reachable, require_sites


@dataclass(frozen=True)
class Outline:
    """A pipeline's UNet and its scale, built from the configuration alone.

    Attributes:
        unet: the UNet on the meta device.
        vae_scale_factor: pixels per latent, in height and width.
    """

    unet: UNet2DConditionModel
    vae_scale_factor: int

    @property
    def native_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that the UNet was made for; None if its config has none."""
        latent = native_latent_size(self.unet)
        if latent is None:
            return None
        return latent[0] * self.vae_scale_factor, latent[1] * self.vae_scale_factor


def load_outline(
    model: str, *, revision: str | None = None, local_files_only: bool = False
) -> Outline:
    """Build the UNet of a model from its configuration; no weights are read or downloaded.

    Args:
        model: diffusers folder, or hub id.
        revision: of a hub id.
        local_files_only: never access the hub.

    Raises:
        ValueError: there is no such model, its UNet can't be built, or no block could be merged.
    """
    unet_config = _read_config(model, "unet/config.json", revision, local_files_only)
    if unet_config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise ValueError(
            f"`model` must have a UNet2DConditionModel, got a {unet_config['_class_name']} "
            f"in {model!r}."
        )
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(unet_config)
        native_latent_size(unet)
    except Exception as error:  # diffusers and torch raise a dozen types on bad configurations
        raise ValueError(
            f"`model` {model!r} has a unet/config.json that diffusers {diffusers.__version__} "
            f"can't build a UNet from: {' '.join(str(error).split())}"
        ) from error
    require_sites(unet)
    return Outline(unet.eval(), _vae_scale_factor(model, revision, local_files_only))


def _vae_scale_factor(model: str, revision: str | None, local_files_only: bool) -> int:
    vae_config = _read_config(model, "vae/config.json", revision, local_files_only)
    # AutoencoderTiny, as in the sample pipeline, has separate channels for encoder and decoder.
    names = ("block_out_channels", "encoder_block_out_channels")
    channels = next((vae_config[name] for name in names if vae_config.get(name)), None)
    if not isinstance(channels, list):
        raise ValueError(
            f"`model` must have an autoencoder with a list of {' or '.join(names)} in its "
            f"vae/config.json, got {channels!r} in {model!r}."
        )
    return int(2 ** (len(channels) - 1))


@dataclass(frozen=True)
class PlannedSite:
    """One self-attention and what a patch would do to it.

    Attributes:
        block: the block's name in the UNet.
        level: 0 is the finest resolution.
        heads: attention heads.
        channels: C of its tokens.
        grid: height and width in tokens.
        tokens_before: N.
        tokens_after: K; N if nothing is merged.
        merged: whether the patch merges here.
    """

    block: str
    level: int
    heads: int
    channels: int
    grid: Grid
    tokens_before: int
    tokens_after: int
    merged: bool


def plan_sites(
    outline: Outline,
    config: MergeConfig,
    *,
    height: int | None = None,
    width: int | None = None,
) -> list[PlannedSite]:
    """What `apply_patch` would merge, for every self-attention in the order they run.

    Args:
        outline: the model.
        config: how tokens are merged; its keep rate must be the same in every step.
        height: of the image in pixels; default: the size that the UNet was made for.
        width: likewise.

    Raises:
        ValueError: the keep rate changes over the steps, the size is unknown or not a multiple of
            `vae_scale_factor`, no block would be merged, or the method can't reach the keep rate
            at this size.
    """
    for rate in config.keep_rates:
        if rate.varies_over_steps:
            raise ValueError(f"`keep_rate` must be the same in every step, got {rate}.")
    latent = _latent_size(outline, height, width)
    targets = choose_targets(outline.unet, config)
    require_reachable(config.parsed_method, targets, *latent)
    rates = {target.site.path: target.keep_rate.at(0.0, target.depth) for target in targets}
    planned = []
    for site in find_sites(outline.unet):
        grid = level_grid(site.level, *latent)
        planned.append(
            PlannedSite(
                block=site.path,
                level=site.level,
                heads=site.heads,
                channels=site.channels,
                grid=grid,
                tokens_before=grid.num_tokens,
                tokens_after=clusters_to_keep(grid.num_tokens, rates.get(site.path, 1.0)),
                merged=site.path in rates,
            )
        )
    return planned


def _latent_size(outline: Outline, height: int | None, width: int | None) -> tuple[int, int]:
    native = outline.native_size or (None, None)
    scale = outline.vae_scale_factor
    size = []
    for name, given, default in (("height", height, native[0]), ("width", width, native[1])):
        pixels = default if given is None else given
        if pixels is None:
            raise ValueError(f"`{name}` must be given: the model's configuration has no size.")
        if pixels < scale or pixels % scale:
            raise ValueError(f"`{name}` must be a positive multiple of {scale}, got {pixels}.")
        size.append(pixels // scale)
    return size[0], size[1]


def _read_config(
    model: str, file: str, revision: str | None, local_files_only: bool
) -> dict[str, Any]:
    path = Path(model).expanduser()
    is_hub_id = not path.exists() and model.count("/") == 1 and model[0] not in "./~"
    if not is_hub_id:
        path = path / file
        if not path.is_file():
            raise ValueError(
                f"`model` must be a diffusers folder with a {file}, or a hub id, got {model!r}."
            )
    else:
        from huggingface_hub import hf_hub_download

        try:
            downloaded = hf_hub_download(
                model, file, revision=revision, local_files_only=local_files_only
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"`model` {model!r} is not a local path, and its {file} cannot be fetched "
                f"({reason})."
            ) from error
        path = Path(downloaded)
    return read_json_object(path)
