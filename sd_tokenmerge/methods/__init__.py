"""Merging methods, by name.

To add one, write a module with a `Method` subclass and list it in `METHODS`, which the contract
tests and the command line go through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.methods.atc import ATC
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.methods.dpc_knn import DPCKNN
from sd_tokenmerge.methods.grid_pooling import GridPooling
from sd_tokenmerge.methods.kmeans import KMeans
from sd_tokenmerge.methods.kmedoids import KMedoids
from sd_tokenmerge.methods.lotm import LoTM
from sd_tokenmerge.methods.parse import parse_method_string
from sd_tokenmerge.methods.random_clusters import RandomClusters
from sd_tokenmerge.methods.tome import ToMe
from sd_tokenmerge.methods.tome_sd import ToMeSD
from sd_tokenmerge.partitions import Partition

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        ATC,
        ToMe,
        ToMeSD,
        LoTM,
        KMeans,
        KMedoids,
        DPCKNN,
        GridPooling,
        RandomClusters,
    )
}


def parse_method(method: str | Method) -> Method:
    """Parse a method string such as `"atc:linkage=complete"`; an instance is returned as it is.

    Raises:
        ValueError: unknown method, unknown option or invalid value; the message lists what is
            allowed.
        TypeError: `method` is neither a string nor a `Method`.
    """
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise TypeError(f"`method` must be a string or a Method, got {type(method).__name__}.")
    return parse_method_string(method, METHODS)


def partition(
    tokens: Tensor,
    method: str | Method = "atc",
    *,
    num_clusters: int,
    grid: tuple[int, ...],
    seed: int = 0,
    scores: Tensor | None = None,
) -> Partition:
    """Cluster each image's tokens `[B, N, C]` into K clusters, with all arguments checked.

    Some checks wait for the device; calling the method itself skips them.

    Args:
        tokens: `[B, N, C]` float, in row-major order, one frame of a video after the other.
        method: a method, or its string such as `"atc:linkage=complete"`.
        num_clusters: K, in [1, N]; some methods cannot reach the smallest. `clusters_to_keep`
            converts a keep rate.
        grid: height and width in tokens, and the number of frames of a video; their product is N.
        seed: seed of a random method, in [0, 2^63); ignored by other methods.
        scores: `[B, N]` non-negative significance of each token, for weighted methods only.

    Returns:
        A checked partition into K non-empty clusters.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong shape or is out of range, the method cannot reach K,
            `tokens` or `scores` are not finite, or `scores` are missing or not used.
    """
    method = parse_method(method)
    _check_tokens(tokens)
    grid = _checked_grid(grid, num_tokens=tokens.shape[1])
    for name, value in (("num_clusters", num_clusters), ("seed", seed)):
        if type(value) is not int:
            raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if not 0 <= seed < 2**63:
        raise ValueError(f"`seed` must be in [0, 2^63), got {seed}.")
    method.require_reachable(num_clusters, grid)
    if scores is not None:
        if not method.uses_scores:
            raise ValueError(f"`scores` must be None for {method}, which does not use them.")
        _check_scores(scores, tokens)
    return method(tokens, num_clusters, grid=grid, seed=seed, scores=scores).check()


def _check_tokens(tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor):
        raise TypeError(f"`tokens` must be a tensor, got {type(tokens).__name__}.")
    if not tokens.is_floating_point():
        raise TypeError(f"`tokens` must be floating point, got {tokens.dtype}.")
    if tokens.ndim != 3 or tokens.numel() == 0:
        raise ValueError(f"`tokens` must be a non-empty [B, N, C], got {list(tokens.shape)}.")
    if not torch.isfinite(tokens).all():
        raise ValueError("`tokens` must be finite, got NaN or infinity.")


def _checked_grid(grid: tuple[int, ...], num_tokens: int) -> Grid:
    is_grid = isinstance(grid, tuple) and len(grid) in (2, 3)
    if not is_grid or any(type(side) is not int for side in grid):
        raise TypeError(
            f"`grid` must be (height, width) or (height, width, frames) in tokens, got {grid!r}."
        )
    checked = Grid(*grid)
    if min(checked) < 1 or checked.num_tokens != num_tokens:
        raise ValueError(
            f"`grid` must be positive and hold the {num_tokens} tokens, got {checked}."
        )
    return checked


def _check_scores(scores: Tensor, tokens: Tensor) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"`scores` must be a tensor, got {type(scores).__name__}.")
    if not scores.is_floating_point():
        raise TypeError(f"`scores` must be floating point, got {scores.dtype}.")
    if scores.shape != tokens.shape[:2]:
        raise ValueError(
            f"`scores` must be {list(tokens.shape[:2])} like the tokens, got {list(scores.shape)}."
        )
    if scores.device != tokens.device:
        raise ValueError(
            f"`scores` must be on the tokens' device {tokens.device}, got {scores.device}."
        )
    if not (torch.isfinite(scores) & (scores >= 0)).all():
        raise ValueError("`scores` must be finite and non-negative.")


__all__ = [
    "ATC",
    "DPCKNN",
    "METHODS",
    "Grid",
    "GridPooling",
    "KMeans",
    "KMedoids",
    "LoTM",
    "Method",
    "RandomClusters",
    "ToMe",
    "ToMeSD",
    "parse_method",
    "partition",
]
