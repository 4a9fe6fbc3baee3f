"""The nearest center of each token, found again and again while centers move.

From one iteration to the next most centers stay where they are. So on the CPU, tokens are compared
only with those that moved. Of each token it is kept how near its nearest center is, and how near
all the others are at least. If its nearest stayed, the nearest is now that one or one that moved;
if not, it is one that moved, provided that it is nearer than all that stayed are at least. Only
where it is not, the token is compared with all centers. The results are those of
`distances.nearest`, which other devices are better off with, but for rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.backend import needs_fixed_shapes
from sd_tokenmerge.methods.distances import nearest, row_blocks, squared_distances


class NearestCenters:
    """The nearest center of each token, for one set of centers after the other.

    Attributes:
        images: the same for each image.

    Args:
        tokens: `[B, N, C]`.
    """

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self.images = [NearestCentersOfImage(image) for image in tokens]

    def of(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        """As `distances.nearest`, `[B, K, C] -> [B, N]` twice; K is never less than before."""
        if needs_fixed_shapes(centers):
            return nearest(self._tokens, centers)
        for image, of_image in zip(self.images, centers, strict=True):
            image.update(of_image)
        return (
            torch.stack([image.distance for image in self.images]),
            torch.stack([image.index for image in self.images]),
        )


class NearestCentersOfImage:
    """The nearest center of each token of one image.

    Attributes:
        tokens: `[N, C]`.
        distance: `[N]`, the squared Euclidean distance to the nearest center.
        index: `[N]` int64, the nearest center; of equally near ones the first.
    """

    distance: Tensor
    index: Tensor

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self._bound = tokens.new_empty(0)  # on the distances to all but the nearest
        self._centers: Tensor | None = None

    def update(self, centers: Tensor) -> None:
        """Find the nearest of other centers, `[K, C]`; K is never less than before."""
        if self._centers is None:
            self.distance, self.index, self._bound = _two_nearest(self.tokens, centers)
        else:
            moved = torch.ones_like(centers[:, 0], dtype=torch.bool)
            former = len(self._centers)
            moved[:former] = (centers[:former] != self._centers).any(1)
            self._compare_with_moved(centers, moved)
        self._centers = centers

    def _compare_with_moved(self, centers: Tensor, moved: Tensor) -> None:
        which = torch.where(moved)[0]
        if len(which) == 0:
            return
        nearest_moved, place, bound = _two_nearest(self.tokens, centers[which])
        index = which[place]
        lost = moved[self.index]
        old = self.distance.masked_fill(lost, torch.inf)
        is_tied = (nearest_moved == old) & (index < self.index)
        is_nearer = (nearest_moved < old) | is_tied
        unknown = torch.where(lost & (nearest_moved >= self._bound))[0]
        farther = torch.maximum(nearest_moved, old)
        self._bound = torch.minimum(self._bound, torch.minimum(bound, farther))
        self.distance = torch.minimum(nearest_moved, old)
        self.index = torch.where(is_nearer, index, self.index)
        found = _two_nearest(self.tokens[unknown], centers)
        self.distance[unknown], self.index[unknown], self._bound[unknown] = found


def _two_nearest(tokens: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest center and how near the second is, `[N, C], [K, C] -> [N]` three times.

    Returns:
        The squared distance to the nearest, its int64 index, and the squared distance to the
        second.
    """
    distance = tokens.new_empty(len(tokens))
    index = torch.empty_like(distance, dtype=torch.int64)
    second = torch.empty_like(distance)
    for rows in row_blocks(len(tokens), len(centers)):
        block = squared_distances(tokens[rows], centers)
        torch.min(block, dim=1, out=(distance[rows], index[rows]))
        block.scatter_(1, index[rows].unsqueeze(1), torch.inf)
        torch.amin(block, dim=1, out=second[rows])
    return distance, index, second
