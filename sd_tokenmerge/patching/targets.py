"""Which self-attentions a `MergeConfig` merges in a denoiser, and how many tokens each keeps."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from sd_tokenmerge.config import MergeConfig
from sd_tokenmerge.keep_rates import KeepRate
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.partitions import clusters_to_keep
from sd_tokenmerge.patching.sites import Site, attention_holders, find_sites, level_grid


@dataclass(frozen=True)
class Target:
    """A self-attention to merge.

    Attributes:
        site: the self-attention.
        keep_rate: the fraction of its tokens that is kept.
        depth: its place among the blocks with the same `keep_rate`, in [0, 1].
    """

    site: Site
    keep_rate: KeepRate
    depth: float


def choose_targets(denoiser: nn.Module, config: MergeConfig) -> list[Target]:
    """The self-attentions to merge, in the order in which they run.

    Args:
        denoiser: the UNet or ControlNet.
        config: its levels and keep rates.

    Raises:
        ValueError: the denoiser has no self-attention to merge, or lacks a level that is named.
    """
    sites = require_sites(denoiser)
    present = sorted({site.level for site in sites})
    if config.by_level is None:
        levels = 1 if config.levels is None else config.levels
        if levels > len(present):
            raise ValueError(
                f"`levels` must be in [1, {len(present)}], the number of resolutions with "
                f"self-attention, got {levels}."
            )
        groups = [
            ([site for site in sites if site.level in present[:levels]], config.keep_rates[0])
        ]
    else:
        for level in config.by_level:
            if level not in present:
                raise ValueError(
                    f"`keep_rate` must name levels with self-attention, which are "
                    f"{', '.join(map(str, present))}, got {level}."
                )
        groups = [
            ([site for site in sites if site.level == level], rate)
            for level, rate in config.by_level.items()
        ]
    chosen = {
        site: Target(site, rate, index / (len(group) - 1) if len(group) > 1 else 0.5)
        for group, rate in groups
        for index, site in enumerate(group)
    }
    return [chosen[site] for site in sites if site in chosen]


def require_sites(denoiser: nn.Module) -> list[Site]:
    """The self-attentions that can be merged, at least one.

    Raises:
        ValueError: the denoiser has none.
    """
    sites = find_sites(denoiser)
    if not sites:
        holders = attention_holders(denoiser)
        raise ValueError(
            "the denoiser must have self-attention in a Transformer2DModel, as those of Stable "
            f"Diffusion 1, 2 and XL do, got a {type(denoiser).__name__} with "
            + (f"attention only in {', '.join(holders)}." if holders else "no attention at all.")
        )
    return sites


def require_reachable(method: Method, targets: list[Target], finest: Grid) -> None:
    """Refuse keep rates that a method can't reach.

    Args:
        method: the merging method.
        targets: the self-attentions to merge.
        finest: the token grid of level 0.

    Raises:
        ValueError: the method can't reach one of the keep rates on its grid.
    """
    wanted = {
        (level_grid(target.site.level, finest), rate)
        for target in targets
        for rate in target.keep_rate.all_at(target.depth)
    }
    for grid, rate in sorted(wanted, reverse=True):
        clusters = clusters_to_keep(grid.num_tokens, rate)
        if clusters < grid.num_tokens:
            method.require_reachable(clusters, grid)
