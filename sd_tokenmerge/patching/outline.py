"""A model's denoiser without its weights, and what a patch would merge in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.hub import read_config
from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.network_size import limited_size
from sd_tokenmerge.partitions import clusters_to_keep
from sd_tokenmerge.patching.families import require_image_denoiser
from sd_tokenmerge.patching.sites import find_sites, latents_per_token, level_grid, native_grid
from sd_tokenmerge.patching.targets import choose_targets, require_reachable, require_sites

_CONFIGS = ("unet/config.json", "transformer/config.json")


@dataclass(frozen=True)
class Outline:
    """A pipeline's denoiser and its scale, built from the configuration alone.

    Attributes:
        denoiser: the UNet or transformer on the meta device.
        pixels_per_token: pixels per token of level 0, in height and width.
    """

    denoiser: Any
    pixels_per_token: int

    @property
    def native_size(self) -> tuple[int, int] | None:
        """Height and width in pixels that the model was made for; None if its config has none."""
        grid = native_grid(self.denoiser)
        if grid is None:
            return None
        return grid.height * self.pixels_per_token, grid.width * self.pixels_per_token


def load_outline(
    model: str, *, revision: str | None = None, local_files_only: bool = False
) -> Outline:
    """Build the denoiser of a model from its configuration; no weights are read or downloaded.

    Args:
        model: diffusers folder, or hub id.
        revision: of a hub id.
        local_files_only: never access the hub.

    Raises:
        ValueError: there is no such model, its denoiser is not supported or can't be built, or no
            block could be merged.
    """
    file, config = read_config(
        model, _CONFIGS, revision=revision, local_files_only=local_files_only
    )
    kind = _denoiser_class(model, file, config)
    try:
        with torch.device("meta"), limited_size():
            denoiser = kind.from_config(config)
        native_grid(denoiser)
        patch = latents_per_token(denoiser)
    except Exception as error:  # diffusers and torch raise a dozen types on bad configurations
        raise ValueError(
            f"`model` {model!r} has a {file} that diffusers {diffusers.__version__} "
            f"can't build a {kind.__name__} from: {' '.join(str(error).split())}"
        ) from error
    require_sites(denoiser)
    scale = read_vae_scale_factor(model, revision, local_files_only)
    return Outline(denoiser.eval(), scale * patch)


def _denoiser_class(model: str, file: str, config: dict[str, Any]) -> Any:
    name = require_image_denoiser(file.partition("/")[0], config, model)
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(
            f"`model` must be one of diffusers {diffusers.__version__}, got a {name} in {model!r}."
        )
    return kind


def read_vae_scale_factor(model: str, revision: str | None, local_files_only: bool) -> int:
    """Pixels per latent, in height and width; arguments are those of `load_outline`.

    Raises:
        ValueError: there is no such model, or its autoencoder's configuration is damaged.
    """
    _, vae_config = read_config(
        model, ("vae/config.json",), revision=revision, local_files_only=local_files_only
    )
    # AutoencoderTiny, as in the sample pipeline, has separate channels for encoder and decoder;
    # Qwen-Image's autoencoder has multiples of a base.
    names = ("block_out_channels", "encoder_block_out_channels", "dim_mult")
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
        block: the block's name in the denoiser.
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
        height: of the image in pixels; default: the size that the model was made for.
        width: likewise.

    Raises:
        ValueError: the keep rate changes over the steps, the size is unknown or not a multiple of
            `pixels_per_token`, no block would be merged, or the method can't reach the keep rate
            at this size.
    """
    for rate in config.keep_rates:
        if rate.varies_over_steps:
            raise ValueError(f"`keep_rate` must be the same in every step, got {rate}.")
    finest = _finest_grid(outline, height, width)
    targets = choose_targets(outline.denoiser, config)
    require_reachable(config.parsed_method, targets, finest)
    rates = {target.site.path: target.keep_rate.at(0.0, target.depth) for target in targets}
    planned = []
    for site in find_sites(outline.denoiser):
        grid = level_grid(site.level, finest)
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


def _finest_grid(outline: Outline, height: int | None, width: int | None) -> Grid:
    native = outline.native_size or (None, None)
    scale = outline.pixels_per_token
    size = []
    for name, given, default in (("height", height, native[0]), ("width", width, native[1])):
        pixels = default if given is None else given
        if pixels is None:
            raise ValueError(f"`{name}` must be given: the model's configuration has no size.")
        if pixels < scale or pixels % scale:
            raise ValueError(f"`{name}` must be a positive multiple of {scale}, got {pixels}.")
        size.append(pixels // scale)
    return Grid(*size)
