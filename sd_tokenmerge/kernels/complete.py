"""Complete linkage on cosine distance, on one matrix of least similarities.

The similarity of two clusters is the smallest one between their tokens. The matrix
(`sd_tokenmerge.kernels.least`) says what it is up to an error. Each cluster keeps a bound on its
similarity to all but the nearest, which stays true as others merge. So when the nearest is merged,
comparing the result with that bound often saves a search of the cluster's row.

Where the matrix does not say which cluster is nearest, the token pairs that can attain the minimum
are computed in float32; where that does not say, and for every merge's height, exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sd_tokenmerge.kernels.exact import (
    best_by_id,
    best_of_pairs,
    rows_per_block,
    similarities_of,
    similarity_block,
)
from sd_tokenmerge.kernels.least import LeastSimilarities, least_by_cluster
from sd_tokenmerge.kernels.members import Members, expand
from sd_tokenmerge.kernels.ranking import at_least, clear, highest_of, two_largest
from sd_tokenmerge.kernels.rounds import Clusters
from sd_tokenmerge.kernels.search import float32_error, precise_dtype

_BLOCK_ROWS = 512
_PAIRS_PER_ROW = 64  # above this many exact token pairs, one exact product per member is cheaper
_PAIRS_AT_ONCE = 1 << 14
_PAIR_ELEMENTS = 1 << 18  # of float32 vectors compared pair by pair: 1 MiB
_FEW_TOKENS = 1536  # below this number, bfloat16 saves less than its extra comparisons cost
_CANDIDATES_PER_ROW = 24  # above this many, bfloat16 is too coarse for these tokens


class Candidates(NamedTuple):
    """Pairs of clusters, of which the nearest for each of M clusters is to be found."""

    clusters: Tensor
    """`[M]` int64."""
    place: Tensor
    """`[P]` int64 in [0, M): whose candidate it is."""
    others: Tensor
    """`[P]` int64: the candidate."""


class CompleteClusters(Clusters):
    """Clusters under complete linkage.

    Args:
        unit: `[N, C]` float64 unit vectors.
        search_dtype: of the matrix, bfloat16 or float32.

    Raises:
        MemoryError: the matrix does not fit; the message states its bytes.
    """

    def __init__(self, unit: Tensor, search_dtype: torch.dtype) -> None:
        super().__init__(1, len(unit), unit.device)
        self._unit = unit
        self._working = unit.to(precise_dtype(unit.device))
        self._error = float32_error(unit.shape[1])
        if search_dtype != torch.bfloat16 or len(unit) < _FEW_TOKENS:
            search_dtype = self._working.dtype
        self._matrix = LeastSimilarities(self._working, search_dtype)
        self._members = Members(self.root)
        self._nearest = torch.zeros_like(self.root)
        self._upper = unit.new_zeros(len(unit))  # bound on the similarity to the nearest
        self._rest = unit.new_zeros(len(unit))  # bound on the similarity to all but the nearest
        self._dormant = torch.zeros_like(self.alive)
        self._is_new = torch.zeros_like(self.alive)

    def first_neighbours(self) -> Tensor:
        """See `Clusters`."""
        found = []
        for part in torch.split(self.root, _BLOCK_ROWS):
            floor = self._rest.new_full((len(part),), -torch.inf)
            keys = self._matrix.fill(int(part[0]), int(part[-1]) + 1)
            nearest, candidates = self._choose(part, keys, self.root, floor)
            if candidates > _CANDIDATES_PER_ROW * len(part) and self._is_coarse:
                del keys  # a view of the matrix, whose memory is needed for the next
                del self._matrix
                self._matrix = LeastSimilarities(self._working, self._working.dtype)
                return self.first_neighbours()
            found.append(nearest)
        self._matrix.is_filled()
        self._nearest = torch.cat(found)
        return self._nearest.clone()

    def neighbours(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """See `Clusters`."""
        new = self._is_new[clusters]
        self._is_new[clusters] = False
        nearest = self.root[self._nearest[clusters]]
        kept = torch.where(~new)[0]
        best = self._unit.new_full((len(clusters),), -torch.inf)
        best[kept] = self._quick_similarities(clusters[kept], nearest[kept])
        rest = self._rest[clusters]
        self._upper[clusters] = torch.maximum(best + self._error, rest)
        hopeless = self._upper[clusters] < floor
        nearest[hopeless] = clusters[hopeless]
        self._dormant[clusters[hopeless]] = True
        search = torch.where(~hopeless & (best - self._error <= rest))[0]
        if len(search):
            nearest[search] = self._search(clusters[search], floor[search])
        self._nearest[clusters] = nearest
        return nearest

    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Clusters`."""
        return self._pair_similarities(left, right, exactly=True)

    def merge(self, left: Tensor, right: Tensor) -> None:
        """See `Clusters`."""
        self._matrix.merge(left, right)
        self._rest[left] = torch.minimum(self._rest[left], self._rest[right])
        self._is_new[left] = True
        self.join(left, right)
        self._members = Members(self.root)

    def within_reach(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """See `Clusters`."""
        return self._upper[clusters] >= floor

    @property
    def _is_coarse(self) -> bool:
        return self._matrix.error > self._error

    def _pair_similarities(self, left: Tensor, right: Tensor, *, exactly: bool) -> Tensor:
        """Least similarity of pairs of clusters, `[P], [P] -> [P]` float64; exact or in float32."""
        if bool(self.alive.all()):
            return self._token_similarities(left, right, exactly)
        left_tokens, left_count = self._attaining(right, left)
        right_tokens, right_count = self._attaining(left, right)
        left_first = left_count.cumsum(0) - left_count
        right_first = right_count.cumsum(0) - right_count
        pairs = left_count * right_count
        lowest = self._unit.new_full((len(left),), torch.inf)
        few = torch.where(pairs <= _PAIRS_AT_ONCE)[0]
        chunk = pairs[few].cumsum(0) // _PAIRS_AT_ONCE
        for part in torch.split(
            few, torch.unique_consecutive(chunk, return_counts=True)[1].tolist()
        ):
            place, nth = expand(pairs[part])
            pair = part[place]
            one = left_tokens[left_first[pair] + nth // right_count[pair]]
            other = right_tokens[right_first[pair] + nth % right_count[pair]]
            lowest.scatter_reduce_(0, pair, self._token_similarities(one, other, exactly), "amin")
        for pair in torch.where(pairs > _PAIRS_AT_ONCE)[0].tolist():
            ones = left_tokens[left_first[pair] :][: left_count[pair]]
            others = self._unit[right_tokens[right_first[pair] :][: right_count[pair]]]
            for part in torch.split(ones, rows_per_block(len(others))):
                least = similarity_block(self._unit[part], others).amin()
                lowest[pair] = torch.minimum(lowest[pair], least)
        return lowest

    def _quick_similarities(self, left: Tensor, right: Tensor) -> Tensor:
        """As `similarity`, in float32."""
        if self._is_coarse:
            return self._pair_similarities(left, right, exactly=False)
        pair, token = self._members.expand(right)
        value = self._matrix.between(left[pair], token)
        return value.new_full((len(left),), torch.inf).scatter_reduce_(0, pair, value, "amin")

    def _attaining(self, clusters: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of `others` that may be the least similar to `clusters`, and how many per pair."""
        pair, token = self._members.expand(others)
        value = self._matrix.between(clusters[pair], token)
        least = value.new_full((len(others),), torch.inf).scatter_reduce_(0, pair, value, "amin")
        near = value <= least[pair] + 2 * self._matrix.error
        return token[near], torch.bincount(pair[near], minlength=len(others))

    def _token_similarities(self, left: Tensor, right: Tensor, exactly: bool) -> Tensor:
        if exactly:
            return similarities_of(self._unit, left, right)
        step = max(1, _PAIR_ELEMENTS // self._working.shape[1])
        products = []
        for one, other in zip(torch.split(left, step), torch.split(right, step), strict=True):
            product = self._working.index_select(0, one)
            products.append(product.mul_(self._working.index_select(0, other)).sum(1))
        return torch.cat(products).double()

    def _search(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """Nearest cluster of the given ones, or itself where none reaches `floor`."""
        columns = torch.where(self.alive & ~self._dormant)[0]
        columns = columns[torch.argsort(self._members.sizes[columns], descending=True, stable=True)]
        own = torch.empty_like(self.root)
        own[columns] = torch.arange(len(columns), device=columns.device)
        nearest = []
        blocks = zip(*(torch.split(part, _BLOCK_ROWS) for part in (clusters, floor)), strict=True)
        for part, part_floor in blocks:
            keys = self._matrix.by_cluster(part, columns, self._members)
            clear(keys, own[part])
            nearest.append(self._choose(part, keys, columns, part_floor)[0])
        return torch.cat(nearest)

    def _choose(
        self, clusters: Tensor, keys: Tensor, columns: Tensor, floor: Tensor
    ) -> tuple[Tensor, int]:
        """Nearest cluster, or itself where none reaches `floor`; and the number of candidates.

        Args:
            clusters: `[M]` int64.
            keys: `[M, K]` of their similarities to `columns`, the lowest to themselves.
            columns: `[K]` int64.
            floor: see `Clusters.neighbours`.
        """
        ranked = two_largest(keys)
        error = self._matrix.error
        best, rest = self._matrix.decode(ranked.best), self._matrix.decode(ranked.second) + error
        hopeless = (best + error < floor) | (best == -torch.inf)
        self._dormant[clusters[hopeless]] = True
        self._upper[clusters], self._rest[clusters] = best + error, rest
        nearest = torch.where(hopeless, clusters, columns[ranked.column])
        unproven = ~hopeless & (best - error <= rest)
        open_rows = torch.where(unproven)[0]
        if len(open_rows) == 0:
            return nearest, 0
        threshold = self._matrix.key_below(best - 2 * error)
        threshold.masked_fill_(~unproven, highest_of(threshold.dtype))
        row, column = at_least(keys, ranked, threshold)
        place = (unproven.cumsum(0) - 1)[row]
        candidates = Candidates(clusters[open_rows], place, columns[column])
        if self._is_coarse:
            nearest[open_rows], rest = self._nearest_quickly(candidates, columns)
            rest = torch.maximum(rest, best[open_rows] - error)  # what the threshold left out
            self._rest[clusters[open_rows]] = rest
        else:
            nearest[open_rows] = self._nearest_of(candidates, columns)
        return nearest, len(row)

    def _nearest_quickly(self, candidates: Candidates, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest of the candidates, by float32 where that suffices; bound on the next one."""
        clusters, place, others = candidates
        value = self._quick_similarities(clusters[place], others)
        lowest = value.new_full((len(clusters),), -torch.inf)
        best = lowest.scatter_reduce(0, place, value, "amax")
        near = value >= best[place] - 2 * self._error
        nearest = clusters.clone()
        nearest[place[near]] = others[near]
        next_one = lowest.scatter_reduce(0, place[~near], value[~near], "amax")
        tied = torch.bincount(place[near], minlength=len(clusters)) > 1
        if bool(tied.any()):
            kept = near & tied[place]
            new_place = (tied.cumsum(0) - 1)[place[kept]]
            close = Candidates(clusters[tied], new_place, others[kept])
            nearest[tied] = self._nearest_of(close, columns)
            next_one[tied] = best[tied]
        return nearest, next_one + self._error

    def _nearest_of(self, candidates: Candidates, columns: Tensor) -> Tensor:
        """Nearest of the candidates by exact similarities."""
        clusters, place, others = candidates
        sizes = self._members.sizes
        pairs = torch.zeros_like(clusters).scatter_add_(0, place, sizes[others])
        many = pairs > _PAIRS_PER_ROW
        nearest = clusters.clone()
        few = torch.where(~many)[0]
        if len(few):
            kept = ~many[place]
            new_place = ((~many).cumsum(0) - 1)[place[kept]]
            exact = self.similarity(clusters[place[kept]], others[kept])
            nearest[few] = best_of_pairs(exact, new_place, clusters[few], others[kept])
        if len(few) < len(clusters):
            nearest[many] = self._nearest_of_all(clusters[many], columns)
        return nearest

    def _nearest_of_all(self, clusters: Tensor, columns: Tensor) -> Tensor:
        """Nearest of all clusters by exact similarities of all their tokens."""
        least = self._unit.new_full((len(clusters), len(self._unit)), torch.inf)
        place, token = self._members.expand(clusters)
        step = rows_per_block(len(self._unit))
        for part, tokens in zip(torch.split(place, step), torch.split(token, step), strict=True):
            exact = similarity_block(self._unit[tokens], self._unit)
            least.scatter_reduce_(0, part.unsqueeze(1).expand_as(exact), exact, "amin")
        return best_by_id(least_by_cluster(least, columns, self._members), clusters, columns)
