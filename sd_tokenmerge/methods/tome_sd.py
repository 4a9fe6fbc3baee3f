"""Token Merging for Stable Diffusion (Bolya and Hoffman, CVPR workshops 2023).

Bipartite soft matching to one destination per `stride` x `stride` cell of the grid (section 4.1):
its top-left token, or one drawn at random. Tokens to the right of or below the last whole cell are
sources, as in the authors' implementation. The draw depends only on the seed and is the same for
all images of a batch. In a video, each frame has cells of its own, and sources are matched with the
destinations of all frames.

The option `lloyd` continues with K-Means (Marin et al., WACV 2023) from these clusters, which is
not part of the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.methods.bipartite import match_bipartite
from sd_tokenmerge.methods.distances import center_tokens
from sd_tokenmerge.methods.kmeans import lloyd
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class ToMeSD(Method):
    """Bipartite soft matching to one destination per cell of the grid.

    Attributes:
        stride: side of a cell in tokens, at least 2; the lowest keep rate is about 1 / stride^2.
        random: draw the destination of each cell from the seed (the authors' default) instead of
            taking its top-left token (the variant that the ATC paper compares with).
        lloyd: number of K-Means iterations after the matching, at least 0 (as in the paper). In
            each, every token joins the cluster of the nearest mean (Euclidean distance).
    """

    name: ClassVar[str] = "tome-sd"
    stride: int = 2
    random: bool = False
    lloyd: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_at_least("stride", 2)
        self.require_at_least("lloyd", 0)

    @property
    def uses_seed(self) -> bool:
        """True with random destinations."""
        return self.random

    @property
    def uses_grid(self) -> bool:
        """True."""
        return True

    def smallest_num_clusters(self, grid: Grid) -> int:
        """The number of destinations; N if a frame is smaller than one cell."""
        cells = grid.frames * (grid.height // self.stride) * (grid.width // self.stride)
        return cells if cells > 0 else grid.num_tokens

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        is_destination = self._destinations(grid, seed)
        index = is_destination.int().argsort(stable=True).to(tokens.device)
        num_sources = grid.num_tokens - self.smallest_num_clusters(grid)
        labels = match_bipartite(tokens, index[:num_sources], index[num_sources:], num_clusters)
        if self.lloyd > 0:
            return lloyd(center_tokens(tokens), labels, num_clusters, self.lloyd)
        return Partition(labels, num_clusters)

    def _destinations(self, grid: Grid, seed: int) -> Tensor:
        """Whether each token is a destination, `[N]` bool on the CPU."""
        rows, columns = grid.height // self.stride, grid.width // self.stride
        cells = (grid.frames, rows, columns)
        offset = torch.zeros(cells, dtype=torch.int64)
        if self.random:
            generator = torch.Generator().manual_seed(seed)
            offset = torch.randint(self.stride**2, cells, generator=generator)
        y = torch.arange(rows).unsqueeze(1) * self.stride + offset // self.stride
        x = torch.arange(columns) * self.stride + offset % self.stride
        is_destination = torch.zeros(grid.shape, dtype=torch.bool)
        is_destination[torch.arange(grid.frames).view(-1, 1, 1), y, x] = True
        return is_destination.flatten()
