"""Patch a run's pipeline, and refuse what cannot work before anything is generated."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from sd_tokenmerge.config import make_config
from sd_tokenmerge.keep_rates import KeepRate, parse_keep_rates
from sd_tokenmerge.patching import targets
from sd_tokenmerge.patching.apply import apply_patch
from sd_tokenmerge.patching.sites import find_denoiser
from sd_tokenmerge.sampling.options import NO_METHOD, GenerateOptions, ResolvedOptions


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
        levels=_levels(options),
        **merging_arguments(options),
    )
    return handle


def merging_arguments(options: GenerateOptions) -> dict[str, Any]:
    """What `apply_patch` is told besides method, keep rate and levels."""
    return {
        "features": options.features,
        "merge": options.merge,
        "refresh_every": options.refresh_every,
        "share_layers": options.share_layers,
        "proportional_attention": options.proportional_attention,
        "seed": options.merge_seed,
    }


def require_reachable(pipe: Any, options: ResolvedOptions) -> None:
    """Refuse a keep rate that the method cannot reach on the grids of this image size.

    `apply_patch` can only check the size that the model was made for.

    Raises:
        ValueError: there is a level at which it cannot.
    """
    config = make_config(options.method, keep_rate=options.keep_rate, levels=_levels(options))
    merged = targets.choose_targets(find_denoiser(pipe), config)
    size = (options.height // pipe.vae_scale_factor, options.width // pipe.vae_scale_factor)
    targets.require_reachable(config.parsed_method, merged, *size)


def _levels(options: ResolvedOptions) -> int | None:
    """What `apply_patch` is told: nothing where the keep rates name the levels."""
    is_by_level = not isinstance(parse_keep_rates(options.keep_rate), KeepRate)
    return None if is_by_level else options.levels
