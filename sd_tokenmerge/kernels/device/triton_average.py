"""Average linkage of a whole batch at once, without waiting for the device; for CUDA, with Triton.

The algorithm is that of `rounds` and `average`, with the same exact comparisons, hence the same
labels; what differs is that every array has a fixed shape. The clusters to search and the clusters
still in play are lists with a count that stays on the device, and each cluster keeps its nearest
and a bound on the rest instead of a longer list. The host looks at the device once in a few rounds,
to see whether the last one still merged anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

import torch
import triton
from torch import Tensor

from sd_tokenmerge.kernels import triton_average as kernels
from sd_tokenmerge.kernels.exact import low_bits, pair_similarities, unit_vectors
from sd_tokenmerge.kernels.rounds import best_disjoint_pairs

_ROUNDS_BETWEEN_TESTS = 4
_BLOCK_CHANNELS = 64


@dataclass
class State:
    """Clusters of B images, each known by its lowest token.

    Attributes:
        total: `[B, N, C]` float64 sum of the unit tokens.
        size: `[B, N]` float64 number of tokens.
        mean: `[B, N, C]` float32.
        nearest: `[B, N]` int64; a cluster out of play, or merged into another, is its own nearest.
        best: `[B, N]` float64 similarity to the nearest when it was found, within `error`.
        rest: `[B, N]` float64; no other is more similar than this plus `error`.
        alive: `[B, N]` int8; whether the token names a cluster.
        dormant: `[B, N]` int8; whether nothing is near enough for any further merge.
        is_new: `[B, N]` int8; whether it was merged from two in this round.
        parent: `[B, N]` int64; what a merged cluster became part of, else itself.
        height: `[B, N]` float64; at what distance, infinity if not merged.
        own_height: `[B, N]` float64; the height of the cluster's own last merge.
        merged_in: `[B, N]` int32; in which round.
        bound: `[B]` float64; the (N - K)-th lowest height so far.
        error: of a float32 product.
    """

    total: Tensor
    size: Tensor
    mean: Tensor
    nearest: Tensor
    best: Tensor
    rest: Tensor
    alive: Tensor
    dormant: Tensor
    is_new: Tensor
    parent: Tensor
    height: Tensor
    own_height: Tensor
    merged_in: Tensor
    bound: Tensor
    error: float

    @classmethod
    def of(cls, tokens: Tensor) -> State:
        """One cluster per token, `[B, N, C]`."""
        batch, count, channels = tokens.shape
        total = unit_vectors(tokens.reshape(-1, channels)).view(batch, count, channels)
        zeros = total.new_zeros(batch, count)
        flags = torch.zeros(batch, count, dtype=torch.int8, device=tokens.device)
        everyone = torch.arange(count, device=tokens.device).repeat(batch, 1)
        return cls(
            total=total,
            size=torch.ones_like(zeros),
            mean=total.float(),
            nearest=everyone.clone(),
            best=zeros.clone(),
            rest=zeros.clone(),
            alive=torch.ones_like(flags),
            dormant=flags.clone(),
            is_new=flags.clone(),
            parent=everyone,
            height=torch.full_like(zeros, torch.inf),
            own_height=zeros,
            merged_in=torch.zeros_like(flags, dtype=torch.int32),
            bound=total.new_full((batch,), torch.inf),
            error=product_error(channels),
        )


def product_error(channels: int) -> float:
    """How far a product of the search can be off: float32 from three TF32 products, or IEEE.

    Each factor keeps 22 bits; C roundings of the sum, and some to spare.
    """
    return (channels + 32) * 2.0**-22


def average_labels(tokens: Tensor, num_clusters: int) -> Tensor:
    """Cut each image's average-linkage hierarchy at K clusters, `[B, N, C] -> [B, N]` int64.

    Args:
        tokens: `[B, N, C]`, any float dtype, on a CUDA device, or on the CPU under Triton's
            interpreter.
        num_clusters: K, in [1, N - 1].
    """
    state = State.of(tokens)
    count = tokens.shape[1]
    _find_nearest(state, torch.ones_like(state.alive))
    for this_round in range(1, (_ROUNDS_BETWEEN_TESTS + 1) * count):
        _merge_pairs(state, this_round, count - num_clusters)
        if this_round % _ROUNDS_BETWEEN_TESTS == 0:
            idle = torch.where(~state.is_new.any(1))[0].tolist()
            restarted = [_pair_up_ties(state, image) for image in idle]
            if len(idle) == len(tokens) and not any(restarted):
                break
        _find_nearest(state, _refresh(state))
    return _cut(state, count - num_clusters)


def _merge_pairs(state: State, this_round: int, num_merges: int) -> None:
    batch, count, channels = state.total.shape
    state.is_new.zero_()
    kernels.merge_pairs[(count, batch)](
        state.nearest,
        state.total,
        state.size,
        state.mean,
        state.rest,
        state.alive,
        state.is_new,
        state.parent,
        state.height,
        state.own_height,
        state.merged_in,
        state.bound,
        this_round,
        count,
        channels,
        LOW_MAGIC=_low_magic(channels),
        BLOCK_C=_BLOCK_CHANNELS,
        enable_fp_fusion=False,
    )
    state.bound = state.height.kthvalue(num_merges, dim=1).values


def _pair_up_ties(state: State, image: int) -> bool:
    """Make nearest neighbours reciprocal in an image where rounding left none, if it did.

    See `_tied_pairs` in `sd_tokenmerge.kernels.rounds`; the next round merges the pairs.
    """
    nearest = state.nearest[image]
    everyone = torch.arange(len(nearest), device=nearest.device)
    within_reach = state.best[image] + state.error >= 1 - state.bound[image]
    row = torch.where((state.alive[image] != 0) & (nearest != everyone) & within_reach)[0]
    other = nearest[row]
    mean = state.total[image] / state.size[image].unsqueeze(1)
    height = 1 - pair_similarities(mean[row], mean[other])
    height = torch.maximum(height, state.own_height[image][row])
    height = torch.maximum(height, state.own_height[image][other])
    low = height <= state.bound[image]
    pairs = best_disjoint_pairs(row[low], other[low], height[low], len(nearest), len(nearest))
    nearest[pairs.left], nearest[pairs.right] = pairs.right, pairs.left
    return len(pairs.left) > 0


def _refresh(state: State) -> Tensor:
    batch, count, channels = state.total.shape
    search = torch.empty_like(state.alive)
    kernels.refresh[(count, batch)](
        state.nearest,
        state.mean,
        state.rest,
        state.alive,
        state.is_new,
        state.parent,
        state.dormant,
        search,
        state.bound,
        state.error,
        count,
        channels,
        BLOCK_C=_BLOCK_CHANNELS,
        enable_fp_fusion=False,
    )
    return search


def _find_nearest(state: State, search: Tensor) -> None:
    batch, count, channels = state.total.shape
    rows, row_count = _listed(search)
    columns, column_count = _listed(state.alive & (1 - state.dormant))
    block = 64
    kernels.find_nearest[(triton.cdiv(count, block), batch)](
        state.mean,
        rows,
        row_count,
        columns,
        column_count,
        state.nearest,
        state.best,
        state.rest,
        state.dormant,
        state.bound,
        state.error,
        count,
        channels,
        PRECISION="tf32x3" if torch.version.cuda else "ieee",
        BLOCK_M=block,
        BLOCK_N=block,
        BLOCK_C=32,
        enable_fp_fusion=False,
    )
    kernels.resolve[(count, batch)](
        state.total,
        state.size,
        state.mean,
        rows,
        row_count,
        columns,
        column_count,
        state.nearest,
        state.best,
        state.rest,
        state.error,
        count,
        channels,
        LOW_MAGIC=_low_magic(channels),
        BLOCK_N=16,
        BLOCK_C=_BLOCK_CHANNELS,
        enable_fp_fusion=False,
    )


def _listed(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The places of the ones in each row, in order, and how many, `[B, N] -> [B, N], [B]`."""
    batch, count = flags.shape
    running = flags.cumsum(1)
    place = torch.where(flags != 0, running - 1, count)  # the others all go to a spare place
    listed = place.new_zeros(batch, count + 1)
    everyone = torch.arange(count, device=flags.device).expand(batch, count)
    return listed.scatter_(1, place, everyone)[:, :count].contiguous(), running[:, -1].contiguous()


def _cut(state: State, num_merges: int) -> Tensor:
    """Apply the lowest merges; among equal heights, the earlier, then that of the lower token."""
    batch, count = state.height.shape
    order = state.parent.argsort(dim=1, stable=True)
    order = order.gather(1, state.merged_in.gather(1, order).argsort(dim=1, stable=True))
    order = order.gather(1, state.height.gather(1, order).argsort(dim=1, stable=True))
    applied = order[:, :num_merges]
    root = torch.arange(count, device=order.device).repeat(batch, 1)
    root.scatter_(1, applied, state.parent.gather(1, applied))
    for _ in range(ceil(log2(count))):
        root = root.gather(1, root)
    is_first = root == torch.arange(count, device=order.device)
    return (is_first.cumsum(1) - 1).gather(1, root)


def _low_magic(channels: int) -> float:
    return 1.5 * 2.0 ** (52 - low_bits(channels))
