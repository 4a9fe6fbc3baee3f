"""The door through which a denoiser clusters tokens: eager, or one opaque op under `torch.compile`.

Clustering has loops and branches that depend on the data, which a compiler cannot trace. Inside a
compiled graph every method is therefore the same single operator, whose output shape is static.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.backend import OUTSIDE_CUDA_GRAPHS
from sd_tokenmerge.methods import METHODS, parse_method
from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.partitions import Partition


def cluster(
    method: Method,
    tokens: Tensor,
    num_clusters: int,
    grid: Grid,
    seed: int = 0,
    scores: Tensor | None = None,
) -> Partition:
    """Cluster each image's tokens, traceable by `torch.compile(fullgraph=True)`.

    Arguments and result are those of `Method.__call__`; nothing is checked that would wait for the
    device.

    Raises:
        ValueError: K is out of the method's reach, or `scores` are missing.
        RuntimeError: while compiling, the method is not in `METHODS`, where the operator
            finds it by name.
    """
    if not torch.compiler.is_compiling():
        return method(tokens, num_clusters, grid=grid, seed=seed, scores=scores)
    labels, representatives = _cluster_tokens(
        tokens.detach(),
        _method_string(method),
        num_clusters,
        grid.height,
        grid.width,
        seed if method.uses_seed else 0,  # else a new seed would compile a new graph for nothing
        scores.detach() if scores is not None and method.uses_scores else None,
    )
    return Partition(
        labels, num_clusters, representatives if representatives.shape[1] > 0 else None
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _method_string(method: Method) -> str:
    if METHODS.get(method.name) is not type(method):
        raise RuntimeError(
            f"{type(method).__name__} must be in `METHODS` under the name {method.name!r} to be "
            "used in a compiled model."
        )
    return str(method)


@torch.library.custom_op("sd_tokenmerge::cluster_tokens", mutates_args=(), **OUTSIDE_CUDA_GRAPHS)
def _cluster_tokens(
    tokens: Tensor,
    method: str,
    num_clusters: int,
    height: int,
    width: int,
    seed: int,
    scores: Tensor | None,
) -> tuple[Tensor, Tensor]:
    partition = parse_method(method)(
        tokens, num_clusters, grid=Grid(height, width), seed=seed, scores=scores
    )
    labels = partition.labels.contiguous()
    if partition.representatives is None:
        return labels, labels.new_empty(labels.shape[0], 0)
    return labels, partition.representatives.contiguous()


@_cluster_tokens.register_fake
def _(
    tokens: Tensor,
    method: str,
    num_clusters: int,
    height: int,
    width: int,
    seed: int,
    scores: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, count, _ = tokens.shape
    num_representatives = num_clusters if parse_method(method).has_representatives else 0
    return (
        tokens.new_empty(batch, count, dtype=torch.int64),
        tokens.new_empty(batch, num_representatives, dtype=torch.int64),
    )
