"""Rounds of reciprocal nearest neighbours in fixed shape, for average and complete linkage.

What a round merges, when clusters leave play, and what happens under ties is described in
`sd_tokenmerge.kernels.rounds`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from sd_tokenmerge.kernels.device.rounds import FixedRounds, Listed, follow, number_by_first
from sd_tokenmerge.kernels.rounds import best_disjoint_pairs


class ReciprocalRounds(FixedRounds):
    """Clusters of B images, each known by its lowest token.

    Attributes:
        nearest: `[B, N]` int64; a cluster out of play, or merged into another, is its own nearest.
        alive: `[B, N]` bool; whether the token names a cluster.
        dormant: `[B, N]` bool; whether nothing is near enough for any further merge.
        is_new: `[B, N]` bool; whether it was merged from two in the last round.
        parent: `[B, N]` int64; what a merged cluster became part of, else itself.
        own_height: `[B, N]` float64; the height of the cluster's own last merge.
    """

    def __init__(self, unit: Tensor, num_merges: int) -> None:
        super().__init__(unit, num_merges)
        self.nearest = self.everyone.repeat(self.batch, 1)
        self.alive = torch.ones_like(self.unproven)
        self.dormant = torch.zeros_like(self.alive)
        self.is_new = torch.ones_like(self.alive)
        self.parent = self.nearest.clone()
        self.own_height = torch.zeros_like(self.height)

    @abstractmethod
    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """Exact similarity of pairs, `[P], [P] -> [P]` float64; token n of image b is `b N + n`."""

    def in_play(self) -> Tensor:
        """See `FixedRounds`."""
        return self.alive & ~self.dormant

    def restart(self, idle: Tensor) -> bool:
        """Make neighbours reciprocal in images where rounding left none that are, if it did.

        See `_tied_pairs` in `sd_tokenmerge.kernels.rounds`; the next round merges the pairs.
        """
        count = self.num_tokens
        waits = idle.unsqueeze(1) & self.alive & (self.nearest != self.everyone)
        row = torch.where(waits.flatten())[0]
        nearest, own_height = self.nearest.flatten(), self.own_height.flatten()
        other = row - row % count + nearest[row]
        height = torch.maximum(own_height[row], own_height[other])
        height = torch.maximum(1 - self.similarity(row, other), height)
        low = height <= self.bound[row // count]
        pairs = best_disjoint_pairs(row[low], other[low], height[low], len(nearest), count)
        nearest[pairs.left], nearest[pairs.right] = pairs.right % count, pairs.left % count
        self.nearest = nearest.view_as(self.nearest)
        return len(pairs.left) > 0

    def labels(self) -> Tensor:
        """See `FixedRounds`."""
        applied = self.lowest_merges(self.parent)
        root = self.everyone.repeat(self.batch, 1)
        return number_by_first(follow(root.scatter_(1, applied, self.parent.gather(1, applied))))


class Nearest(NamedTuple):
    """The nearest of each of W listed clusters."""

    token: Tensor
    """`[B, W]` int64; arbitrary where there is none."""
    highest: Tensor
    """`[B, W]` float64: no other is more similar than this; -inf where there is none."""
    proven: Tensor
    """`[B, W]` bool."""


class TorchRounds(ReciprocalRounds):
    """The steps of a round in plain torch; `unproven` clusters are those to search for."""

    def __init__(self, unit: Tensor, num_merges: int) -> None:
        super().__init__(unit, num_merges)
        self.unproven.fill_(True)

    @abstractmethod
    def nearest_in_play(self, listed: Listed) -> Nearest:
        """Nearest cluster in play of every listed one."""

    @abstractmethod
    def similarity_to_nearest(self) -> Tensor:
        """Exact similarity of every cluster to its nearest, `[B, N]` float64."""

    @abstractmethod
    def combine(self, left: Tensor) -> None:
        """Make these clusters the union of themselves and their nearest, `[B, N]` bool."""

    def search(self) -> None:
        """See `FixedRounds`."""
        listed = self.list_in_play()
        found = Nearest(*(part.gather(1, listed.place) for part in self.nearest_in_play(listed)))
        # those not searched for keep theirs: under rounding, a merge may seem to come nearer
        nearest = torch.where(self.unproven, found.token, self.nearest)
        hopeless = (1 - found.highest > self.bound.unsqueeze(1)) | (found.highest == -torch.inf)
        hopeless &= self.in_play()
        self.dormant |= hopeless
        self.nearest = torch.where(hopeless, self.everyone, nearest)
        self.unproven &= ~(hopeless | found.proven)

    def merge(self, this_round: int) -> None:
        """See `FixedRounds`."""
        partner = self.nearest
        mutual = (partner.gather(1, partner) == self.everyone) & (partner != self.everyone)
        mutual &= ~self.unproven.any(1, keepdim=True)
        height = torch.maximum(self.own_height, self.own_height.gather(1, partner))
        height = torch.maximum(1 - self.similarity_to_nearest(), height)
        merged = mutual & (height <= self.bound.unsqueeze(1))
        left, right = merged & (self.everyone < partner), merged & (self.everyone > partner)
        self.combine(left)
        self.nearest = torch.where((mutual & ~merged) | right, self.everyone, partner)
        self.alive &= ~right
        self.is_new = left
        self.moved = left.any(1)
        self.parent = torch.where(right, partner, self.parent)
        self.own_height = torch.where(left, height, self.own_height)
        self.height = torch.where(right, height, self.height)
        self.merged_in.masked_fill_(right, this_round)
        self.lower_bound()
        self.unproven |= self.alive & (left | merged.gather(1, self.nearest))
