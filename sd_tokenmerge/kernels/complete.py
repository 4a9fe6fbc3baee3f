"""Complete linkage on cosine distance, on one matrix of least similarities.

The similarity of two clusters is the smallest one between their tokens. The matrix
(`sd_tokenmerge.kernels.least`) says what it is up to an error. Each cluster keeps a bound on its
similarity to all but the nearest, which stays true as others merge. So when the nearest is merged,
comparing the result with that bound often saves a search of the cluster's row.

Where the matrix does not say which cluster is nearest, the token pairs that can attain the minimum
are computed in float32; where that does not say, and for every merge's height, exactly.
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
from sd_tokenmerge.kernels.search import blocks, precise_dtype
from sd_tokenmerge.kernels.unit_rows import UnitRows

_FILLED_ROWS = 512
_SEARCHED_ROWS = 512
_FEW_TOKENS = 1536  # below this number, bfloat16 saves less than its extra comparisons cost
_CANDIDATES_PER_ROW = 24  # above this many, bfloat16 is too coarse for these tokens


class CompleteClusters(Clusters):
    """Clusters under complete linkage.

    Args:
        tokens: `[N, C]`, any float dtype.
        search_dtype: of the matrix, bfloat16 or float32.

    Raises:
        MemoryError: the matrix does not fit; the message states its bytes.
        ValueError: `tokens` are not finite.
    """

    def __init__(self, tokens: Tensor, search_dtype: torch.dtype) -> None:
        super().__init__(1, len(tokens), tokens.device)
        self._rows = UnitRows(tokens)
        self._precise = precise_dtype(tokens.device)
        if search_dtype != torch.bfloat16 or len(tokens) < _FEW_TOKENS:
            search_dtype = self._precise
        self._matrix = LeastSimilarities(self._rows, search_dtype)
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
        for part in torch.split(self.root, _FILLED_ROWS):
            floor = self._rest.new_full((len(part),), -torch.inf)
            keys = self._matrix.fill(int(part[0]), int(part[-1]) + 1)
            nearest, candidates = self._choose(part, keys, self.root, floor)
            if candidates > _CANDIDATES_PER_ROW * len(part) and self._known.is_coarse:
                del keys  # a view of the matrix, whose memory is needed for the next
                del self._matrix
                self._matrix = LeastSimilarities(self._rows, self._precise)
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
        self._matrix.merge(left, right)
        self._rest[left] = torch.minimum(self._rest[left], self._rest[right])
        self._is_new[left] = True
        self.join(left, right)
        self._members = Members(self.root)

    def within_reach(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """See `Clusters`."""
        return self._upper[clusters] >= floor

    @property
    def _known(self) -> ClusterPairs:
        return ClusterPairs(self._rows, self._matrix, self._members)

    def _search(self, clusters: Tensor, floor: Tensor) -> Tensor:
        """Nearest cluster of the given ones, or itself where none reaches `floor`."""
        columns = torch.where(self.alive & ~self._dormant)[0]
        columns = columns[torch.argsort(self._members.sizes[columns], descending=True, stable=True)]
        own = torch.empty_like(self.root)
        own[columns] = torch.arange(len(columns), device=columns.device)
        nearest = []
        for part, part_floor in blocks(_SEARCHED_ROWS, clusters, floor):
            keys = self._matrix.by_cluster(part, columns, self._members)
            clear(keys, own[part])
            nearest.append(self._choose(part, keys, columns, part_floor)[0])
            del keys  # before the next block is made
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
        known = self._known
        if known.is_coarse:
            nearest[open_rows], rest = nearest_quickly(candidates, columns, known)
            rest = torch.maximum(rest, best[open_rows] - error)  # what the threshold left out
            self._rest[clusters[open_rows]] = rest
        else:
            nearest[open_rows] = nearest_exactly(candidates, columns, known)
        return nearest, len(row)
