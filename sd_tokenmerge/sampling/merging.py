"""Patch a run's pipeline, and refuse unusable options before anything is generated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sd_tokenmerge.patching import targets
from sd_tokenmerge.patching.apply import apply_patch
from sd_tokenmerge.patching.sites import find_denoiser
from sd_tokenmerge.sampling.options import ResolvedOptions


def patched(pipe: Any, options: ResolvedOptions) -> AbstractContextManager[Any]:
    """Apply the options' patch, if any; the context removes it.

    `apply_patch` checks only the image size that the model was made for, so the run's own size is
    checked here.

    Raises:
        ValueError: an option of the patch is invalid, or the method cannot reach the keep rate at
            this image size.
    """
    config = options.merging
    if config is None:
        return nullcontext()
    chosen = targets.choose_targets(find_denoiser(pipe), config)
    size = (options.height // pipe.vae_scale_factor, options.width // pipe.vae_scale_factor)
    targets.require_reachable(config.parsed_method, chosen, *size)
    handle: AbstractContextManager[Any] = apply_patch(pipe, config)
    return handle
