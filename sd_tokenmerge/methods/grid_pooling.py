"""Regular pooling, a control: what merging costs if only the tokens' positions are used.

The grid is cut into R horizontal bands and each band into K // R or K // R + 1 cells, as evenly as
integers allow; each cell is a cluster, and every K in [1, N] can be reached. R is chosen to keep
tokens closest to the centers of their cells: on an even grid, K = N / 4 gives cells of 2 x 2 tokens
and K = N / 2 cells of two. Deterministic.

In a video of F frames, each frame is cut like an image, into K // F or K // F + 1 cells; if K < F,
each cluster consists of whole consecutive frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from sd_tokenmerge.methods.base import Grid, Method
from sd_tokenmerge.partitions import Partition


@dataclass(frozen=True)
class GridPooling(Method):
    """Rectangular cells of the grid, ignoring the tokens' features."""

    name: ClassVar[str] = "grid"

    @property
    def uses_tokens(self) -> bool:
        """False."""
        return False

    @property
    def uses_grid(self) -> bool:
        """True."""
        return True

    def _cluster(
        self, tokens: Tensor, num_clusters: int, grid: Grid, seed: int, scores: Tensor | None
    ) -> Partition:
        parts = min(grid.frames, num_clusters)
        frames: list[Tensor] = []
        for part in range(parts):
            first, end = (edge * num_clusters // parts for edge in (part, part + 1))
            cells = first + _cut_frame(grid, end - first, tokens.device)
            num_frames = (part + 1) * grid.frames // parts - len(frames)
            frames += num_frames * [cells]
        labels = torch.stack(frames).reshape(1, -1)
        return Partition(labels.repeat(len(tokens), 1), num_clusters)


def _cut_frame(grid: Grid, num_clusters: int, device: torch.device) -> Tensor:
    """The cell of each token of a frame, `[height, width]` int64 in [0, K)."""
    bands = best_num_bands(grid, num_clusters)
    rows = torch.arange(grid.height, device=device).unsqueeze(1)
    columns = torch.arange(grid.width, device=device)
    band = _part(rows, grid.height, bands)
    first_cell = band * num_clusters // bands
    num_cells = (band + 1) * num_clusters // bands - first_cell
    return first_cell + _part(columns, grid.width, num_cells)


@lru_cache(maxsize=256)
def best_num_bands(grid: Grid, num_clusters: int) -> int:
    """The number of bands with the smallest sum of squared distances to the cells' centers.

    There are at most as many bands as rows and clusters, and at most as many cells in a band as
    columns; the smallest number wins a tie.
    """
    fewest = -(-num_clusters // grid.width)
    candidates = range(fewest, min(grid.height, num_clusters) + 1)
    return min(candidates, key=lambda bands: _spread(grid, num_clusters, bands))


def _spread(grid: Grid, num_clusters: int, bands: int) -> int:
    # A row of n tokens has the spread n (n^2 - 1) / 12 about its center; the 12 is left out.
    total = 0
    for band in range(bands):
        height = (band + 1) * grid.height // bands - band * grid.height // bands
        cells = (band + 1) * num_clusters // bands - band * num_clusters // bands
        width, wider = divmod(grid.width, cells)
        for cell_width, number in ((width, cells - wider), (width + 1, wider)):
            total += number * height * cell_width * (height**2 + cell_width**2 - 2)
    return total


def _part(place: Tensor, length: int, parts: Tensor | int) -> Tensor:
    """Which even part of `[0, length)` a place is in; part p starts at p * length // parts."""
    return ((place + 1) * parts - 1) // length
