"""Nearest neighbours within each of several small images, all in one product.

For few tokens, calls cost more time than arithmetic. So the rows and columns of all images are
padded to one shape and searched together, with the guarantees of `sd_tokenmerge.kernels.search`.
Token n of image b has the number `b * N + n`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_tokenmerge.kernels.ranking import clear, largest_similarities
from sd_tokenmerge.kernels.search import (
    LIST_LENGTH,
    Lists,
    float32_error,
    join_lists,
)

_FEW_TOKENS = 2048
_LANES = 64
_LANES_LISTED = 3
_BLOCK_ELEMENTS = 1 << 18


def are_small(num_tokens: int) -> bool:
    """Whether images of N tokens are better searched together than one by one."""
    return num_tokens <= _FEW_TOKENS


def lists_by_image(vectors: Tensor, rows: Tensor, columns: Tensor) -> Lists:
    """The most similar columns of each row in its image, `[M], [S] -> [M, LIST_LENGTH]`.

    Args:
        vectors: `[B, N, C]` of length at most one, in `precise_dtype`.
        rows: `[M]` int64, ascending token numbers.
        columns: `[S]` int64, ascending token numbers; all rows are among them, and are left out of
            their own lists.
    """
    batch, count, channels = vectors.shape
    flat = vectors.flatten(0, 1)
    row, column = _Table(rows, batch, count, 1), _Table(columns, batch, count, _LANES)
    own = torch.searchsorted(columns, row.tokens) - column.first
    counts = column.counts.tolist()
    height, width = row.tokens.shape[1], column.tokens.shape[1]
    rows_at_once = max(1, _BLOCK_ELEMENTS // width)
    found = []
    for some in torch.split(torch.arange(batch), max(1, rows_at_once // height)):
        images = slice(int(some[0]), int(some[-1]) + 1)
        right = flat.index_select(0, column.tokens[images].flatten()).view(-1, width, channels).mT
        for part in torch.split(torch.arange(height), rows_at_once):
            block = images, slice(int(part[0]), int(part[-1]) + 1)
            left = flat.index_select(0, row.tokens[block].flatten()).view(-1, len(part), channels)
            values = torch.bmm(left, right)
            for image, width_used in zip(values, counts[images], strict=True):
                image[:, width_used:] = -torch.inf
            values = values.flatten(0, 1)
            clear(values, own[block].flatten())
            found.append(_best_of_lanes(values, float32_error(channels)))
    lists = join_lists(found)
    listed = column.tokens.gather(1, lists.column.view(batch, -1)).view(-1, LIST_LENGTH)
    return Lists(listed[row.place], lists.value[row.place], lists.bound[row.place])


def _best_of_lanes(values: Tensor, error: float) -> Lists:
    """The best columns of each row, looked for in the few best of 64 interleaved lanes."""
    lanes = values.view(len(values), -1, _LANES)
    _, lane, rest = largest_similarities(lanes.amax(1), _LANES_LISTED)
    steps = torch.arange(0, values.shape[1], _LANES, device=values.device)
    column = (lane.unsqueeze(2) + steps).flatten(1)
    value, place, unlisted = largest_similarities(values.gather(1, column), LIST_LENGTH)
    bound = torch.maximum(rest, unlisted).double() + error
    return Lists(column.gather(1, place), value, bound)


class _Table:
    """Token numbers in one row per image, padded at the end with the image's first token.

    Attributes:
        tokens: `[B, width]` int64.
        first: `[B, 1]` int64, where the list continues in each row.
        counts: `[B]` int64, how many there are of each image.
        place: `[M]` int64, where each listed token is in the flattened table.

    Args:
        listed: `[M]` int64, ascending token numbers.
        batch: B.
        count: N.
        multiple: what the width is a multiple of.
    """

    def __init__(self, listed: Tensor, batch: int, count: int, multiple: int) -> None:
        image = listed // count
        images = torch.arange(batch, device=listed.device).unsqueeze(1)
        self.first = torch.searchsorted(image, images)
        self.counts = torch.bincount(image, minlength=batch)
        place = torch.arange(len(listed), device=listed.device) - self.first[image, 0]
        width = -(-int(self.counts.max()) // multiple) * multiple
        self.place = place.add_(image, alpha=width)
        self.tokens = (images * count).repeat(1, width)
        self.tokens.view(-1)[self.place] = listed
