"""Single linkage on cosine distance: Boruvka's minimum spanning tree.

Cutting single linkage at K clusters keeps the N - K shortest edges of the tokens' minimum spanning
tree. In a round, every component takes its shortest edge to a token outside (Boruvka, 1926): all of
these belong to the tree, and they at least halve the number of components, so that there are at
most log2(N) rounds. Edges are ordered by exact length and then by their tokens, which makes the
tree unique.

Each token keeps a short list of the most similar others and a bound on the rest. It is searched for
again, among the tokens outside its component, only when its bound leaves room for an edge shorter
than the component's best and than the (N - K)-th shortest edge found so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import pair_similarities, rows_per_block, similarity_block
from sd_tokenmerge.kernels.hierarchy import Merges, concatenate
from sd_tokenmerge.kernels.search import (
    float32_error,
    mutual_lists,
    nearest_lists,
    precise_dtype,
)
from sd_tokenmerge.kernels.vectors import UnitVectors, blocks

_PAIR_ELEMENTS = 1 << 17  # numbers of vectors compared pair by pair


def spanning_tree(tokens: Tensor, num_edges: int) -> Merges:
    """The shortest `num_edges` edges of the minimum spanning tree, and usually some more.

    Args:
        tokens: `[N, C]`, any float dtype.
        num_edges: N - K, in [1, N - 1].

    Raises:
        ValueError: `tokens` are not finite.
    """
    forest = _Forest(tokens)
    made: list[Merges] = []
    limit = torch.tensor(torch.inf, dtype=torch.float64, device=tokens.device)
    while len((edges := forest.grow(limit)).left):
        made.append(edges)
        heights = torch.cat([part.height for part in made])
        if len(heights) >= num_edges:
            limit = heights.kthvalue(num_edges).values
    return concatenate(made)


class _Forest:
    """Components of the tree found so far, known by their lowest tokens."""

    def __init__(self, tokens: Tensor) -> None:
        self._unit = UnitVectors(tokens)
        self._rounded = self._unit.rounded(precise_dtype(tokens.device))
        self._error = float32_error(tokens.shape[1])
        self._everyone = torch.arange(len(tokens), device=tokens.device)
        self._component = self._everyone.clone()
        self._lists = mutual_lists(self._rounded)

    def grow(self, limit: Tensor) -> Merges:
        """Join every component to its nearest one if that is at most `limit` away.

        Args:
            limit: float64 scalar, cosine distance.

        Returns:
            The edges, sorted by their tokens; none if every component is farther than `limit`.
        """
        floor = 1 - limit
        unproven = self._tokens_with_better_edges(floor)
        if len(unproven):
            found = nearest_lists(self._rounded, unproven, self._everyone, self._component)
            for old, new in zip(self._lists, found, strict=True):
                old[unproven] = new
            unproven = self._tokens_with_better_edges(floor)
        row, other, similarity = self._candidates(floor)
        if len(unproven):
            nearest, exact = self._nearest_outside(unproven)
            row, other = torch.cat((row, unproven)), torch.cat((other, nearest))
            similarity = torch.cat((similarity, exact))
        edges = self._shortest(row, other, similarity, limit)
        joined = Merges(self._component[edges.left], self._component[edges.right], edges.height)
        self._component = joined.labels(len(self._component))[self._component]
        return edges

    def _outside(self) -> tuple[Tensor, Tensor]:
        """Listed similarities, -inf within a component; each component's largest, by token."""
        inside = self._component[self._lists.column] == self._component.unsqueeze(1)
        value = self._lists.value.masked_fill(inside, -torch.inf)
        largest = value.new_full((len(value),), -torch.inf)
        largest.scatter_reduce_(0, self._component, value.amax(1), "amax")
        return value, largest[self._component]

    def _tokens_with_better_edges(self, floor: Tensor) -> Tensor:
        """Tokens that may have an unlisted edge shorter than their component's best."""
        bound, (_, largest) = self._lists.bound, self._outside()
        may_beat = bound >= largest.double() - self._error
        return torch.where(may_beat & (bound >= floor) & (bound > -torch.inf))[0]

    def _candidates(self, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Listed edges that may be their component's shortest: two tokens, exact similarity."""
        value, largest = self._outside()
        near = value >= largest.unsqueeze(1) - 2 * self._error
        row, place = torch.where(near & (value.double() + self._error >= floor) & value.isfinite())
        other = self._lists.column[row, place]
        exact = [value.new_empty(0, dtype=torch.float64)]
        for one, two in blocks(max(1, _PAIR_ELEMENTS // self._rounded.shape[1]), row, other):
            exact.append(pair_similarities(self._unit.exact(one), self._unit.exact(two)))
        return row, other, torch.cat(exact)

    def _nearest_outside(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's exactly nearest token outside its component, lowest on ties; similarity."""
        found, values = [], []
        vectors = self._unit.exact(self._everyone)
        for part in torch.split(tokens, rows_per_block(len(vectors))):
            similarity = similarity_block(vectors[part], vectors)
            inside = self._component[part].unsqueeze(1) == self._component
            similarity.masked_fill_(inside, -torch.inf)
            best = similarity.amax(1, keepdim=True)
            found.append(torch.where(similarity == best, self._everyone, len(vectors)).amin(1))
            values.append(best.squeeze(1))
        return torch.cat(found), torch.cat(values)

    def _shortest(self, row: Tensor, other: Tensor, similarity: Tensor, limit: Tensor) -> Merges:
        """Each component's shortest edge; of equal ones, that of the lowest tokens."""
        count = len(self._component)
        component = self._component[row]
        best = similarity.new_full((count,), -torch.inf)
        best.scatter_reduce_(0, component, similarity, "amax")
        edge = torch.minimum(row, other) * count + torch.maximum(row, other)
        edge = torch.where(similarity == best[component], edge, count * count)
        lowest = torch.full_like(self._component, count * count)
        lowest.scatter_reduce_(0, component, edge, "amin")
        chosen = torch.where((edge == lowest[component]) & (1 - similarity <= limit))[0]
        edge, order = edge[chosen].sort()
        is_first = torch.ones_like(edge, dtype=torch.bool)
        is_first[1:] = edge[1:] != edge[:-1]  # two components may choose the same edge
        edge, chosen = edge[is_first], chosen[order][is_first]
        return Merges(edge // count, edge % count, 1 - similarity[chosen])
