"""Turning token merging on and off: `apply_patch` and `remove_patch`."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, get_args

from torch import nn

from sd_tokenmerge.hook import Merging
from sd_tokenmerge.keep_rate_strings import KeepRateLike, parse_keep_rates
from sd_tokenmerge.keep_rates import KeepRate
from sd_tokenmerge.methods import parse_method
from sd_tokenmerge.methods.base import Method
from sd_tokenmerge.partitions import clusters_to_keep
from sd_tokenmerge.patch import MergedSite, Patch, Report, find_patch
from sd_tokenmerge.presets import Features, Merge, find_preset
from sd_tokenmerge.sites import (
    cache_over_steps,
    find_denoiser,
    find_sites,
    level_grid,
    native_latent_size,
    num_train_timesteps,
)


def apply_patch(
    pipe: Any,
    method: str | Method | None = None,
    *,
    preset: str = "exact",
    keep_rate: KeepRateLike | Mapping[int, KeepRateLike] | None = None,
    levels: int | None = None,
    features: Features | None = None,
    merge: Merge | None = None,
    refresh_every: int | None = None,
    share_layers: bool | None = None,
    proportional_attention: bool | None = None,
    seed: int = 0,
    replace: bool = False,
) -> PatchHandle:
    """Merge tokens around the self-attentions of a pipeline's UNet.

        apply_patch(pipe)                                           # ATC as in its paper
        apply_patch(pipe, "tome-sd", keep_rate=0.4)
        apply_patch(pipe, preset="fast")
        apply_patch(pipe, preset="fast", keep_rate=Linear(0.5, 0.1))

    Works on a UNet before and after `torch.compile`, LoRA, IP-Adapter, offloading and the like, in
    any order. Cross-attention and feed-forward see all tokens. A patched UNet must not be called
    from two threads at a time.

    Args:
        pipe: a pipeline with a UNet (its ControlNet is left alone), a UNet, or a ControlNet.
        method: a method or its string, such as `"atc"` or `"atc:linkage=complete"`; None, here and
            below: what `preset` says.
        preset: a name from `PRESETS`: `"exact"`, the papers' form (their method `"atc"`, keep rate
            0.5, features `"input"`, merge `"qkv"`, always fresh), `"balanced"` or `"fast"`.
        keep_rate: fraction of the tokens that is kept, in (0, 1]; 1 changes nothing. `Linear` and
            `During` change it over the steps, `Depth` over the blocks; a dict gives one for each
            level, finest 0, and merges no other level. Each also as a string: `"0.5"`,
            `"linear:first=1,last=0.4"`, `"0=0.5,1=depth:rate=0.8"`.
        levels: how many of the finest resolutions that have self-attention are merged, at least 1;
            None: 1, or those that `keep_rate` names.
        features: what is clustered: the block's `"input"`, as in ToMe-SD's and ATC's experiments,
            or the attention's `"keys"` averaged over its heads, as in ATC's description.
        merge: `"qkv"` merges queries, keys and values and gives each token its cluster's output
            (the papers). `"kv"` keeps every query and attends to merged keys and values. `"q"`
            attends with merged queries to every key and value.
        refresh_every: denoising steps for which a partition is used, at least 1: entries of the
            scheduler's `timesteps`, of which schedulers of second order have two for each step.
        share_layers: whether the blocks of a level use the partition of the first of them.
        proportional_attention: whether a merged key counts as many times as it has tokens (ToMe);
            not for `merge="q"`, which merges no keys.
        seed: what random methods draw from, together with block and timestep; in [0, 2^63).
        replace: whether to replace a patch that is already there.

    Returns:
        A handle: `handle.report()`, `handle.remove()`; as a context manager it removes the patch at
        the end of the block.

    Raises:
        TypeError: an argument is of the wrong type, or `pipe` has no UNet.
        ValueError: an argument is out of range, no block would be merged, or the method can't reach
            the keep rate at the size the UNet was made for (for other sizes, the call of the UNet
            raises it).
        RuntimeError: `pipe` is already patched, or caches the output of its self-attentions.
    """
    base = find_preset(preset)
    method = parse_method(base.method if method is None else method)
    refresh_every = base.refresh_every if refresh_every is None else refresh_every
    share_layers = base.share_layers if share_layers is None else share_layers
    merging = _checked_merging(
        base.features if features is None else features,
        base.merge if merge is None else merge,
        base.proportional_attention if proportional_attention is None else proportional_attention,
    )
    _require_integer("refresh_every", refresh_every, 1)
    _require_integer("seed", seed, 0)
    if seed >= 2**63:
        raise ValueError(f"`seed` must be in [0, 2^63), got {seed}.")
    _require_bool("share_layers", share_layers)
    denoiser = find_denoiser(pipe)
    merged = choose_sites(denoiser, base.keep_rate if keep_rate is None else keep_rate, levels)
    if share_layers and any(one.keep_rate.varies_over_blocks for one in merged):
        raise ValueError("`share_layers` must be False with a keep rate that differs by block.")
    native = native_latent_size(denoiser)
    if native is not None:
        require_reachable(method, merged, *native)
    for site in (one.site for one in merged):
        cache_name = cache_over_steps(site.attention)
        if cache_name is not None:
            raise RuntimeError(
                f"`pipe` must not cache its self-attentions over steps, got {cache_name!r} on "
                f"{site.path}: it would replay merged tokens under another partition."
            )
    present = find_patch(denoiser)
    if present is not None and not replace:
        raise RuntimeError(
            "`pipe` is already patched. Call remove_patch(pipe) first, or pass replace=True."
        )
    if present is not None:
        present.detach_from(denoiser)
    patch = Patch(
        method,
        merging,
        refresh_every,
        share_layers,
        seed,
        find_sites(denoiser),
        merged,
        num_train_timesteps(pipe),
    )
    patch.attach_to(denoiser, merged)
    return PatchHandle(denoiser, patch)


def remove_patch(pipe: Any) -> None:
    """Undo `apply_patch`: the model is then exactly what it was before.

    Args:
        pipe: what was given to `apply_patch`, or a copy of it.

    Raises:
        TypeError: `pipe` has no UNet.
        RuntimeError: `pipe` is not patched.
    """
    denoiser = find_denoiser(pipe)
    patch = find_patch(denoiser)
    if patch is None:
        raise RuntimeError("`pipe` must be patched to remove a patch, got one that is not.")
    patch.detach_from(denoiser)


class PatchHandle:
    """A patch in force; as a context manager, until the end of the block."""

    def __init__(self, denoiser: nn.Module, patch: Patch) -> None:
        self._denoiser = denoiser
        self._patch = patch

    def remove(self) -> None:
        """Undo this patch; nothing happens where it was removed or replaced before."""
        if find_patch(self._denoiser) is self._patch:
            self._patch.detach_from(self._denoiser)

    def report(self) -> Report:
        """What was merged so far, also after the patch is removed."""
        return self._patch.report()

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def _checked_merging(features: Features, merge: Merge, proportional_attention: bool) -> Merging:
    _require_bool("proportional_attention", proportional_attention)
    for name, value, allowed in (
        ("features", features, get_args(Features)),
        ("merge", merge, get_args(Merge)),
    ):
        if value not in allowed:
            raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
    if proportional_attention and merge == "q":
        raise ValueError(
            "`proportional_attention` must be False for merge='q', which merges no keys."
        )
    return Merging(features, merge, proportional_attention)


def _require_integer(name: str, value: int, low: int) -> None:
    if type(value) is not int:
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if value < low:
        raise ValueError(f"`{name}` must be at least {low}, got {value}.")


def _require_bool(name: str, value: bool) -> None:
    if type(value) is not bool:
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def choose_sites(
    denoiser: nn.Module,
    keep_rate: KeepRateLike | Mapping[int, KeepRateLike],
    levels: int | None,
) -> list[MergedSite]:
    """What is merged, in the order in which it runs.

    Args:
        denoiser: whose self-attentions.
        keep_rate: as in `apply_patch`.
        levels: as in `apply_patch`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of range, or there is nothing to merge.
    """
    sites = find_sites(denoiser)
    present = sorted({site.level for site in sites})
    if not present:
        raise ValueError(
            "`pipe` must have self-attention in BasicTransformerBlocks to merge around, "
            f"found none in its {type(denoiser).__name__}."
        )
    rates = parse_keep_rates(keep_rate)
    if isinstance(rates, KeepRate):
        levels = 1 if levels is None else levels
        _require_integer("levels", levels, 1)
        if levels > len(present):
            raise ValueError(
                f"`levels` must be in [1, {len(present)}], the number of resolutions with "
                f"self-attention, got {levels}."
            )
        groups = [([site for site in sites if site.level in present[:levels]], rates)]
    else:
        if levels is not None:
            raise ValueError("`levels` must be left out where `keep_rate` names them, got both.")
        for level in rates:
            if level not in present:
                raise ValueError(
                    f"`keep_rate` must have levels with self-attention, which are "
                    f"{', '.join(map(str, present))}, got {level}."
                )
        groups = [([s for s in sites if s.level == level], rate) for level, rate in rates.items()]
    chosen = {
        site: MergedSite(site, rate, index / (len(group) - 1) if len(group) > 1 else 0.5)
        for group, rate in groups
        for index, site in enumerate(group)
    }
    return [chosen[site] for site in sites if site in chosen]


def require_reachable(method: Method, merged: list[MergedSite], height: int, width: int) -> None:
    """Refuse keep rates that a method can't reach.

    Args:
        method: that clusters.
        merged: where, and how much is kept.
        height: of the latents.
        width: of the latents.

    Raises:
        ValueError: there is one.
    """
    wanted = {
        (level_grid(one.site.level, height, width), rate)
        for one in merged
        for rate in one.keep_rate.all_at(one.depth)
    }
    for grid, rate in sorted(wanted, reverse=True):
        clusters = clusters_to_keep(grid.num_tokens, rate)
        if clusters < grid.num_tokens:
            method.require_reachable(clusters, grid)
