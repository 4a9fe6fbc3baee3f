"""Token merging for Stable Diffusion in diffusers.

The public names are loaded on first use, so that `import sd_tokenmerge` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd_tokenmerge.config import PRESETS, MergeConfig
    from sd_tokenmerge.keep_rates import Depth, During, KeepRate, Linear
    from sd_tokenmerge.methods import (
        ATC,
        DPCKNN,
        METHODS,
        Grid,
        GridPooling,
        KMeans,
        KMedoids,
        LoTM,
        Method,
        RandomClusters,
        ToMe,
        ToMeSD,
        parse_method,
        partition,
    )
    from sd_tokenmerge.partitions import Partition, clusters_to_keep
    from sd_tokenmerge.patching.apply import PatchHandle, apply_patch, remove_patch
    from sd_tokenmerge.report.clusters import draw_clusters
    from sd_tokenmerge.report.overlay import (
        draw_cluster_frames,
        draw_cluster_grid,
        save_animation,
    )

__version__ = "0.1.0"

__all__ = [
    "ATC",
    "DPCKNN",
    "METHODS",
    "PRESETS",
    "Depth",
    "During",
    "Grid",
    "GridPooling",
    "KMeans",
    "KMedoids",
    "KeepRate",
    "Linear",
    "LoTM",
    "MergeConfig",
    "Method",
    "Partition",
    "PatchHandle",
    "RandomClusters",
    "ToMe",
    "ToMeSD",
    "apply_patch",
    "clusters_to_keep",
    "draw_cluster_frames",
    "draw_cluster_grid",
    "draw_clusters",
    "parse_method",
    "partition",
    "remove_patch",
    "save_animation",
]

_HOMES = {
    "MergeConfig": "config",
    "PRESETS": "config",
    "Depth": "keep_rates",
    "During": "keep_rates",
    "KeepRate": "keep_rates",
    "Linear": "keep_rates",
    "Partition": "partitions",
    "clusters_to_keep": "partitions",
    "PatchHandle": "patching.apply",
    "apply_patch": "patching.apply",
    "remove_patch": "patching.apply",
    "draw_clusters": "report.clusters",
    "draw_cluster_frames": "report.overlay",
    "draw_cluster_grid": "report.overlay",
    "save_animation": "report.overlay",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOMES.get(name, 'methods')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
