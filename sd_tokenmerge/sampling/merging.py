"""Patch a run's pipeline, and refuse what cannot work before anything is generated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sd_tokenmerge.methods import parse_method
from sd_tokenmerge.partitions import clusters_to_keep
from sd_tokenmerge.patcher import apply_patch
from sd_tokenmerge.sampling.options import NO_METHOD, ResolvedOptions
from sd_tokenmerge.sites import find_denoiser, find_sites, level_grid


def patched(pipe: Any, options: ResolvedOptions) -> AbstractContextManager[Any]:
    """Apply the options' patch; the context removes it.

    Raises:
        ValueError: an option of the patch is bad, or the method cannot reach the keep rate at this
            image size.
    """
    if options.method == NO_METHOD:
        return nullcontext()
    require_reachable(pipe, options)
    handle: AbstractContextManager[Any] = apply_patch(
        pipe,
        options.method,
        keep_rate=options.keep_rate,
        levels=options.levels,
        features=options.features,
        merge=options.merge,
        refresh_every=options.refresh_every,
        share_layers=options.share_layers,
        proportional_attention=options.proportional_attention,
        seed=options.merge_seed,
    )
    return handle


def require_reachable(pipe: Any, options: ResolvedOptions) -> None:
    """Refuse a keep rate that the method cannot reach on the grids of this image size.

    `apply_patch` can only check the size that the model was made for.

    Raises:
        ValueError: there is a level at which it cannot.
    """
    method = parse_method(options.method)
    levels = sorted({site.level for site in find_sites(find_denoiser(pipe))})
    scale = pipe.vae_scale_factor
    for level in levels[: options.levels]:
        grid = level_grid(level, options.height // scale, options.width // scale)
        clusters = clusters_to_keep(grid.num_tokens, options.keep_rate)
        if clusters < grid.num_tokens:
            method.require_reachable(clusters, grid)
