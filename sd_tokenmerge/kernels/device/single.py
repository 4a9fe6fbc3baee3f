"""Single linkage in fixed shape: Boruvka's minimum spanning tree.

As in `sd_tokenmerge.kernels.single`, every component takes its shortest edge to a token outside,
edges being ordered by exact length and then by their tokens; at most log2(N) rounds. A token whose
nearest token outside its component is farther than the (N - K)-th shortest edge so far leaves play:
distances to what is outside only grow. It is then no one's nearest within that distance either.

An edge between two components is recorded by the one that stops being named by its token: each
token is the name of a component that ends at most once, and all N - 1 edges have a place of fixed
shape. The cut is found in the same rounds among the edges kept.
"""

from __future__ import annotations

from math import ceil, log2
from typing import ClassVar

import torch
from torch import Tensor

from sd_tokenmerge.kernels.device.rounds import FixedRounds, follow, number_by_first, take
from sd_tokenmerge.kernels.device.search import most_similar
from sd_tokenmerge.kernels.exact import rows_per_block, similarity_block
from sd_tokenmerge.kernels.search import float32_error


class SingleRounds(FixedRounds):
    """Components of the spanning trees of B images, each known by one of its tokens.

    Args:
        unit: `[B, N, C]` float64 unit vectors.
        num_merges: N - K, in [1, N - 1].
    """

    rounds_between_tests: ClassVar[int] = 2

    def __init__(self, unit: Tensor, num_merges: int) -> None:
        super().__init__(unit, num_merges)
        self._unit = unit
        self._error = float32_error(unit.shape[2])
        self._component = self.everyone.repeat(self.batch, 1)
        self._in_play = torch.ones_like(self.unproven)
        self._other = self._component.clone()  # the nearest token outside that is known
        self._similarity = torch.zeros_like(self.height)  # to it, exact
        self._no_edge = self.num_tokens**2
        self._edge = torch.full_like(self._component, self._no_edge)  # what a name's end recorded

    def in_play(self) -> Tensor:
        """See `FixedRounds`."""
        return self._in_play

    def search(self) -> None:
        """See `FixedRounds`."""
        listed = self.list_in_play()
        component = self._component.gather(1, listed.token)
        few = most_similar(take(self._unit, listed.token), component, listed.valid)
        best = few.similarity.amax(2)
        others = listed.token.gather(1, few.place.flatten(1)).view(few.place.shape)
        other = torch.where(few.similarity == best.unsqueeze(2), others, self.num_tokens).amin(2)
        found = (part.gather(1, listed.place) for part in (other, best, few.rest))
        self._other, best, rest = found
        highest = torch.maximum(best, rest) + self._error
        within_reach = (1 - highest <= self.bound.unsqueeze(1)) & (highest > -torch.inf)
        self._in_play = self._in_play & within_reach
        self._similarity = best.masked_fill(~self._in_play, -torch.inf)
        rest = rest.masked_fill(~self._in_play, -torch.inf)
        longest = self._largest_by_component().gather(1, self._component)
        self.unproven = self._in_play & (rest >= longest)

    def prove(self, images: list[int]) -> None:
        """See `FixedRounds`."""
        for image in images:
            unit, component = self._unit[image], self._component[image]
            tokens = torch.where(self.unproven[image])[0]
            for part in torch.split(tokens, rows_per_block(self.num_tokens)):
                similarity = similarity_block(unit[part], unit)
                inside = component[part].unsqueeze(1) == component
                similarity.masked_fill_(inside, -torch.inf)
                best = similarity.amax(1)
                is_best = similarity == best.unsqueeze(1)
                self._other[image, part] = torch.where(
                    is_best, self.everyone, self.num_tokens
                ).amin(1)
                self._similarity[image, part] = best
        self.unproven.zero_()

    def restart(self, idle: Tensor) -> bool:
        """Nothing is left once every component's shortest edge is too long."""
        return False

    def merge(self, this_round: int) -> None:
        """See `FixedRounds`."""
        count, token, other = self.num_tokens, self.everyone, self._other
        largest = self._largest_by_component()
        chosen = self._in_play & (self._similarity == largest.gather(1, self._component))
        chosen &= 1 - self._similarity <= self.bound.unsqueeze(1)
        chosen &= ~self.unproven.any(1, keepdim=True)
        edge = torch.minimum(token, other) * count + torch.maximum(token, other)
        edge = edge.masked_fill(~chosen, self._no_edge)
        lowest = torch.full_like(edge, self._no_edge)
        lowest.scatter_reduce_(1, self._component, edge, "amin")
        has_edge = lowest < self._no_edge
        edge = lowest.masked_fill(~has_edge, 0)
        ends = (self._component.gather(1, end) for end in (edge // count, edge % count))
        self._component, hooked = _join(self._component, has_edge, *ends)
        self.moved = hooked.any(1)
        self._edge = torch.where(hooked, edge, self._edge)
        self.height = torch.where(hooked, 1 - largest, self.height)
        self.merged_in.masked_fill_(hooked, this_round)
        self.lower_bound()

    def labels(self) -> Tensor:
        """See `FixedRounds`."""
        edge = self._edge.gather(1, self.lowest_merges(self._edge))
        ends = edge // self.num_tokens, edge % self.num_tokens
        rank = self.everyone[:, : self.num_merges]
        component = self.everyone.repeat(self.batch, 1)
        for _ in range(ceil(log2(self.num_tokens))):
            left, right = (component.gather(1, end) for end in ends)
            outgoing = torch.where(left != right, rank, self.num_tokens)
            first = torch.full_like(component, self.num_tokens)
            for end in (left, right):
                first.scatter_reduce_(1, end, outgoing, "amin")
            has_edge = first < self.num_tokens
            first.masked_fill_(~has_edge, 0)
            component, _ = _join(component, has_edge, left.gather(1, first), right.gather(1, first))
        root = torch.full_like(component, self.num_tokens)
        root.scatter_reduce_(1, component, self.everyone.expand_as(component), "amin")
        return number_by_first(root.gather(1, component))

    def _largest_by_component(self) -> Tensor:
        """The largest of the known similarities to the outside, by the component's name."""
        largest = torch.full_like(self._similarity, -torch.inf)
        return largest.scatter_reduce_(1, self._component, self._similarity, "amax")


def _join(
    component: Tensor, has_edge: Tensor, left: Tensor, right: Tensor
) -> tuple[Tensor, Tensor]:
    """Join every component to the other end of its edge.

    The edges are each component's first in one strict order, so that the only cycles are pairs of
    components with the same edge.

    Args:
        component: `[B, N]` int64.
        has_edge: `[B, N]` bool, by the component's name.
        left: `[B, N]` int64, the component at the one end of its edge; arbitrary without an edge.
        right: `[B, N]` int64, at the other end; one of both is the component itself.

    Returns:
        The component of every token, and which names have ended, `[B, N]` bool.
    """
    name = torch.arange(component.shape[1], device=component.device).expand_as(component)
    target = torch.where(has_edge, torch.where(left == name, right, left), name)
    stays = (target.gather(1, target) == name) & (name <= target)
    parent = torch.where(stays, name, target)
    return follow(parent).gather(1, component), ~stays
