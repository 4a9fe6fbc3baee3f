"""Complete linkage on cosine distance, without a matrix of distances.

The similarity of two clusters is the smallest one between their tokens. A search computes it up to
an error, for one cluster and all others (`sd_tokenmerge.kernels.least`). Each cluster keeps a bound
on its similarity to all but the nearest, which stays true as others merge. So when the nearest is
merged, comparing the result with that bound often saves a search.

Where a search does not say which cluster is nearest, the candidates' token pairs are computed in
float32; where that does not say, and for every merge's height, exactly
(`sd_tokenmerge.kernels.cluster_pairs`). Memory is O(N C) plus blocks of a few MiB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.candidates import Candidates, nearest_exactly, nearest_quickly
from sd_tokenmerge.kernels.cluster_pairs import ClusterPairs
from sd_tokenmerge.kernels.least import LeastSimilarities
from sd_tokenmerge.kernels.members import Members
from sd_tokenmerge.kernels.ranking import at_least, clear, highest_of, two_largest
from sd_tokenmerge.kernels.rounds import Clusters
from sd_tokenmerge.kernels.search import precise_dtype
from sd_tokenmerge.kernels.unit_rows import UnitRows

_FEW_TOKENS = 1536  # below this number, bfloat16 saves less than its extra comparisons cost
_CANDIDATES_PER_ROW = 24  # above this many, bfloat16 is too coarse for these tokens


class CompleteClusters(Clusters):
    """Clusters under complete linkage.

    Args:
        tokens: `[N, C]`, any float dtype.
        search_dtype: bfloat16 or float32.

    Raises:
        ValueError: `tokens` are not finite.
    """

    def __init__(self, tokens: Tensor, search_dtype: torch.dtype) -> None:
        super().__init__(1, len(tokens), tokens.device)
        self._rows = UnitRows(tokens)
        self._precise = precise_dtype(tokens.device)
        if search_dtype != torch.bfloat16 or len(tokens) < _FEW_TOKENS:
            search_dtype = self._precise
        self._least = LeastSimilarities(self._rows, search_dtype)
        self._members = Members(self.root)
        self._nearest = torch.zeros_like(self.root)
        # bounds on the similarities to the nearest, and to all but the nearest
        self._upper = torch.zeros_like(self.root, dtype=torch.float64)
        self._rest = torch.zeros_like(self._upper)
        self._dormant = torch.zeros_like(self.alive)
        self._is_new = torch.zeros_like(self.alive)

    def first_neighbours(self) -> Tensor:
        """See `Clusters`."""
        found = []
        for part in torch.split(self.root, self._least.rows_at_once):
            floor = self._rest.new_full((len(part),), -torch.inf)
            keys = self._least.of_tokens(int(part[0]), int(part[-1]) + 1)
            nearest, candidates = self._choose(part, keys, self.root, self.root, floor)
            if candidates > _CANDIDATES_PER_ROW * len(part) and self._is_coarse:
                del self._least  # whose memory is needed for the next
                self._least = LeastSimilarities(self._rows, self._precise)
                return self.first_neighbours()
            found.append(nearest)
        self._nearest = torch.cat(found)
        return self._nearest.clone()

    def neighbours(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """See `Clusters`."""
        new = self._is_new[clusters]
        self._is_new[clusters] = False
        nearest = self.root[self._nearest[clusters]]
        kept = torch.where(~new)[0]
        best = self._rest.new_full((len(clusters),), -torch.inf)
        best[kept] = self._known.quick(clusters[kept], nearest[kept])
        rest = self._rest[clusters]
        self._upper[clusters] = torch.maximum(best + self._rows.error, rest)
        hopeless = self._upper[clusters] < floor
        nearest[hopeless] = clusters[hopeless]
        self._dormant[clusters[hopeless]] = True
        search = torch.where(~hopeless & (best - self._rows.error <= rest))[0]
        if len(search):
            nearest[search] = self._search(clusters[search], floor[search])
        self._nearest[clusters] = nearest
        return nearest

    def similarity(self, left: Tensor, right: Tensor) -> Tensor:
        """See `Clusters`."""
        return self._known.exact(left, right)

    def merge(self, left: Tensor, right: Tensor) -> None:
        """See `Clusters`."""
        self._least.merge(left, right)
        self._rest[left] = torch.minimum(self._rest[left], self._rest[right])
        self._is_new[left] = True
        self.join(left, right)
        self._members = Members(self.root)

    def within_reach(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """See `Clusters`."""
        return self._upper[clusters] >= floor

    @property
    def _known(self) -> ClusterPairs:
        return ClusterPairs(self._rows, self._members)

    @property
    def _is_coarse(self) -> bool:
        """Whether a search knows less than float32 products."""
        return self._least.error > self._rows.error

    def _search(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """Nearest cluster of the given ones, or itself where none reaches `floor`."""
        in_play = self._in_play
        columns = self._least.look_at(in_play, self._members)
        own = torch.empty_like(self.root)
        own[columns] = torch.arange(len(columns), device=columns.device)
        nearest = torch.empty_like(self.root)
        floors = torch.empty_like(self._rest)
        floors[clusters] = floor
        for part in torch.split(self._by_size(clusters), self._least.rows_at_once):
            keys = self._least.of_clusters(part)
            clear(keys, own[part])
            nearest[part] = self._choose(part, keys, columns, in_play, floors[part])[0]
            del keys  # before the next block is made
        return nearest[clusters]

    @property
    def _in_play(self) -> Tensor:
        return self._by_size(torch.where(self.alive & ~self._dormant)[0])

    def _by_size(self, clusters: Tensor) -> Tensor:
        """The largest first."""
        sizes = self._members.sizes[clusters]
        return clusters[torch.argsort(sizes, descending=True, stable=True)]

    def _choose(
        self, clusters: Tensor, keys: Tensor, columns: Tensor, in_play: Tensor, floor: Tensor
    ) -> tuple[Tensor, int]:
        """Nearest cluster, or itself where none reaches `floor`; and the number of candidates.

        Args:
            clusters: `[M]` int64.
            keys: `[M, K]` of their similarities to `columns`, the lowest to themselves.
            columns: `[K]` int64.
            in_play: `[K']` int64, those of the columns that are, by descending size.
            floor: see `Clusters.neighbours`.
        """
        ranked = two_largest(keys)
        error = self._least.error
        best, rest = self._least.decode(ranked.best), self._least.decode(ranked.second) + error
        hopeless = (best + error < floor) | (best == -torch.inf)
        self._dormant[clusters[hopeless]] = True
        self._upper[clusters], self._rest[clusters] = best + error, rest
        nearest = torch.where(hopeless, clusters, columns[ranked.column])
        unproven = ~hopeless & (best - error <= rest)
        open_rows = torch.where(unproven)[0]
        if len(open_rows) == 0:
            return nearest, 0
        threshold = self._least.key_below(best - 2 * error)
        threshold.masked_fill_(~unproven, highest_of(threshold.dtype))
        row, column = at_least(keys, ranked, threshold)
        place = (unproven.cumsum(0) - 1)[row]
        candidates = Candidates(clusters[open_rows], place, columns[column])
        known = self._known
        if self._is_coarse:
            nearest[open_rows], rest = nearest_quickly(candidates, in_play, known)
            rest = torch.maximum(rest, best[open_rows] - error)  # what the threshold left out
            self._rest[clusters[open_rows]] = rest
        else:
            nearest[open_rows] = nearest_exactly(candidates, in_play, known)
        return nearest, len(row)
