"""Single linkage on cosine distance: Boruvka's minimum spanning tree.

Cutting single linkage at K clusters is keeping the N - K shortest edges of the minimum spanning
tree of the tokens. In a round, every component takes its shortest edge to a token outside (Boruvka,
1926): all of these belong to the tree, at least halving the number of components, so that there are
at most log2(N) rounds. Edges are ordered by exact length and then by their tokens, which makes the
tree unique.

Each token keeps a short list of the most similar others and a bound on the rest. It is searched for
again, among the tokens outside its component, only when its bound leaves room for an edge shorter
than the component's best and than the (N - K)-th shortest edge found so far.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import rows_per_block, similarity_block
from sd_tokenmerge.kernels.hierarchy import Merges, concatenate
from sd_tokenmerge.kernels.nearest import mutual_nearest_lists, nearest_lists
from sd_tokenmerge.kernels.search import float32_error, precise_dtype
from sd_tokenmerge.kernels.unit_rows import UnitRows


def spanning_tree(tokens: Tensor, num_edges: int, search_dtype: torch.dtype) -> Merges:
    """The shortest `num_edges` edges of the minimum spanning tree, and usually some more.

    Args:
        tokens: `[N, C]`, any float dtype.
        num_edges: N - K, in [1, N - 1].
        search_dtype: see `nearest_lists`.
    """
    forest = _Forest(tokens, search_dtype)
    made: list[Merges] = []
    bound = torch.tensor(torch.inf, dtype=torch.float64, device=tokens.device)
    while len((edges := forest.grow(bound)).left):
        made.append(edges)
        heights = torch.cat([part.height for part in made])
        if len(heights) >= num_edges:
            bound = heights.kthvalue(num_edges).values
    return concatenate(made)


class _Forest:
    """Components of the tree found so far."""

    def __init__(self, tokens: Tensor, search_dtype: torch.dtype) -> None:
        self._unit = UnitRows(tokens)
        self._rows = self._unit.rounded(precise_dtype(tokens.device))
        self._search_dtype = search_dtype
        self._error = float32_error(tokens.shape[1])
        self._component = torch.arange(len(tokens), device=tokens.device)
        self._lists = mutual_nearest_lists(self._rows, search_dtype)

    def grow(self, bound: Tensor) -> Merges:
        """Join every component to its nearest, where that is at most `bound` away.

        Args:
            bound: float64 scalar, cosine distance.

        Returns:
            The edges, sorted by their tokens; none if every component is farther than `bound`.
        """
        floor = 1 - bound
        hidden = self._rows_that_hide_edges(floor)
        if len(hidden):
            self._search(hidden)
            hidden = self._rows_that_hide_edges(floor)
        row, other, similarity = self._candidates(floor)
        if len(hidden):
            nearest, exact = self._nearest_outside(hidden)
            row, other = torch.cat((row, hidden)), torch.cat((other, nearest))
            similarity = torch.cat((similarity, exact))
        edges = self._shortest(row, other, similarity, bound)
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

    def _rows_that_hide_edges(self, floor: Tensor) -> Tensor:
        """Tokens that may have an unlisted edge which matters."""
        bound = self._lists.bound
        _, largest = self._outside()
        matters = (
            (bound >= largest.double() - self._error) & (bound >= floor) & (bound > -torch.inf)
        )
        return torch.where(matters)[0]

    def _search(self, tokens: Tensor) -> None:
        lists = nearest_lists(
            self._rows,
            tokens,
            None,
            self._component[tokens],
            self._search_dtype,
            groups=self._component,
        )
        for old, new in zip(self._lists, lists, strict=True):
            old[tokens] = new

    def _candidates(self, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Listed edges that can be their component's shortest: two tokens, exact similarity."""
        value, largest = self._outside()
        near = value >= largest.unsqueeze(1) - 2 * self._error
        row, place = torch.where(near & (value.double() + self._error >= floor) & value.isfinite())
        other = self._lists.column[row, place]
        return row, other, self._unit.similarities(row, other)

    def _nearest_outside(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest of the exactly nearest tokens outside each token's component; similarity."""
        found, values = [], []
        everyone = torch.arange(len(self._unit), device=tokens.device)
        everything = self._unit.exact(everyone)
        for part in torch.split(tokens, rows_per_block(len(everyone))):
            similarity = similarity_block(everything[part], everything)
            inside = self._component[part].unsqueeze(1) == self._component
            similarity.masked_fill_(inside, -torch.inf)
            best = similarity.amax(1, keepdim=True)
            found.append(torch.where(similarity == best, everyone, len(everyone)).amin(1))
            values.append(best.squeeze(1))
        return torch.cat(found), torch.cat(values)

    def _shortest(self, row: Tensor, other: Tensor, similarity: Tensor, bound: Tensor) -> Merges:
        """Each component's shortest edge; of equal ones, that of the lowest tokens."""
        count = len(self._component)
        component = self._component[row]
        best = similarity.new_full((count,), -torch.inf)
        best.scatter_reduce_(0, component, similarity, "amax")
        edge = torch.minimum(row, other) * count + torch.maximum(row, other)
        edge = torch.where(similarity == best[component], edge, count * count)
        lowest = torch.full_like(self._component, count * count)
        lowest.scatter_reduce_(0, component, edge, "amin")
        chosen = torch.where((edge == lowest[component]) & (1 - similarity <= bound))[0]
        edge, order = edge[chosen].sort()
        is_first = torch.ones_like(edge, dtype=torch.bool)
        is_first[1:] = edge[1:] != edge[:-1]  # two components may choose the same edge
        edge, chosen = edge[is_first], chosen[order][is_first]
        return Merges(edge // count, edge % count, 1 - similarity[chosen])
