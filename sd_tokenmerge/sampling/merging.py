"""Patch a run's pipeline, and refuse unusable options before anything is generated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sd_tokenmerge.methods.base import Grid
from sd_tokenmerge.patching import targets
from sd_tokenmerge.patching.apply import apply_patch
from sd_tokenmerge.patching.sites import find_denoiser, latents_per_token
from sd_tokenmerge.sampling.options import ResolvedOptions


def patched(pipe: Any, options: ResolvedOptions) -> AbstractContextManager[Any]:
    """Apply the options' patch, if any; the context removes it.

    `apply_patch` checks only the image size that the model was made for, so the run's own size is
    checked here.

    Raises:
        ValueError: the image size is not a whole number of tokens, an option of the patch is
            invalid, or the method cannot reach the keep rate at this image size.
    """
    require_whole_tokens(pipe, options)
    config = options.merging
    if config is None:
        return nullcontext()
    chosen = targets.choose_targets(find_denoiser(pipe), config)
    scale = pixels_per_token(pipe)
    grid = Grid(options.height // scale, options.width // scale)
    targets.require_reachable(config.parsed_method, chosen, grid)
    handle: AbstractContextManager[Any] = apply_patch(pipe, config)
    return handle


def require_whole_tokens(pipe: Any, options: ResolvedOptions) -> None:
    """Refuse image sizes that pipelines round or fail at.

    Raises:
        ValueError: the image size is not a whole number of tokens.
    """
    scale = pixels_per_token(pipe)
    for name in ("height", "width"):
        pixels = getattr(options, name)
        if pixels % scale:
            raise ValueError(
                f"`{name}` must be a multiple of {scale} for this model, got {pixels}."
            )


def pixels_per_token(pipe: Any) -> int:
    """Pixels per token of level 0, in height and width."""
    return int(pipe.vae_scale_factor * latents_per_token(find_denoiser(pipe)))
