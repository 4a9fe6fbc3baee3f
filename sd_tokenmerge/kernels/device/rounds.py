"""Rounds of fixed shape: the host does not wait for the device between them.

On an accelerator, an array whose size depends on data (the reciprocal pairs, the rows to search)
must be counted before it can be made: the host waits for the device, and the device then waits for
the host, several times in every round. Here every array has the same shape in every round, and what
does not matter is masked. The host looks at the device only in the *stop test*, once in a few
rounds. There it learns whether anything moved, and how many clusters are still in play: the shape
of the rounds that follow.

The labels are those of `sd_tokenmerge.kernels.rounds` and `single`, bit for bit, ties included,
because the rounds are the same:

- A search of fixed shape (`search`) proves most rows' nearest by exact comparisons of a few
  candidates. An image in which a row that matters stays unproven *waits*: nothing in it moves until
  the next stop test compares the row with everything; there, arrays of any shape are allowed. So
  each image goes through the same rounds with the same exactly known neighbours, some of them
  later; the order of its merges, which decides among equal heights, is the same too.
- Images share nothing but the shape.

Between two stop tests every unfinished image moves at least once, so the rounds end. Tokens that
all tie take one stop test for each of their log2(N) rounds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import count
from math import ceil, log2
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

_BLOCK_NUMBERS = 1 << 24  # looked at together: 128 MiB in float64


class Listed(NamedTuple):
    """Tokens with some property, in one row per image."""

    token: Tensor
    """`[B, W]` int64: those with the property, ascending, then others."""
    valid: Tensor
    """`[B, W]` bool: which have it."""
    place: Tensor
    """`[B, N]` int64: where a token that has it is listed."""


class FixedRounds(ABC):
    """Hierarchies of B images under some linkage, growing in rounds.

    Attributes:
        batch: B.
        num_tokens: N.
        num_merges: N - K, in [1, N - 1].
        width: W, at least the number of tokens in play in any image.
        everyone: `[1, N]` int64, the token numbers.
        unproven: `[B, N]` bool; rows whose nearest is an open question that matters.
        moved: `[B]` bool; whether the last round merged anything.
        height: `[B, N]` float64; the distance at which the cluster known by a token became part of
            another, infinity where it did not.
        merged_in: `[B, N]` int32; in which round.
        bound: `[B]` float64; the (N - K)-th lowest height so far.

    Args:
        unit: `[B, N, C]` float64 unit vectors, of which this class reads the shape and the device.
        num_merges: N - K, in [1, N - 1].
    """

    rounds_between_tests: ClassVar[int] = 4

    def __init__(self, unit: Tensor, num_merges: int) -> None:
        shape, device = unit.shape[:2], unit.device
        self.batch, self.num_tokens = shape
        self.num_merges = num_merges
        self.width = self.num_tokens
        self.everyone = torch.arange(self.num_tokens, device=device).unsqueeze(0)
        self.unproven = torch.zeros(shape, dtype=torch.bool, device=device)
        self.moved = torch.ones(self.batch, dtype=torch.bool, device=device)
        self.height = torch.full(shape, torch.inf, dtype=torch.float64, device=device)
        self.merged_in = torch.zeros(shape, dtype=torch.int32, device=device)
        self.bound = self.height[:, 0].clone()

    @abstractmethod
    def search(self) -> None:
        """Find out what is nearest now; mark what is not proven as `unproven`."""

    @abstractmethod
    def merge(self, this_round: int) -> None:
        """Merge what this round merges, in images where nothing is unproven; set `moved`."""

    @abstractmethod
    def prove(self, images: list[int]) -> None:
        """Find the nearest of everything unproven in these images; called by the stop test."""

    @abstractmethod
    def restart(self, idle: Tensor) -> bool:
        """Whether anything is left to do in these images, `[B]` bool; called by the stop test.

        Nothing in them is unproven; the last round did not change them, or nothing is in play.
        """

    @abstractmethod
    def in_play(self) -> Tensor:
        """Which tokens a search looks at, `[B, N]` bool; none comes back."""

    @abstractmethod
    def labels(self) -> Tensor:
        """Apply the lowest merges, `[B, N]` int64; clusters are numbered by their first tokens."""

    def goes_on(self) -> bool:
        """The stop test, the one place that waits for the device."""
        unproven, in_play = self.unproven.any(1), self.in_play().sum(1)
        idle = ~(self.moved | unproven) | (in_play == 0)
        are_idle, are_unproven, counts = torch.stack((idle, unproven, in_play)).tolist()
        self.width = max(1, *counts)
        if any(are_unproven):
            self.prove([image for image, waits in enumerate(are_unproven) if waits])
        restarted = any(are_idle) and self.restart(idle)
        return restarted or not all(are_idle)

    def list_in_play(self) -> Listed:
        """The tokens in play, in W places."""
        in_play = self.in_play()
        token, found = list_tokens(in_play)
        place = (in_play.cumsum(1) - 1).clamp_(min=0)
        return Listed(token[:, : self.width], self.everyone[:, : self.width] < found, place)

    def lower_bound(self) -> None:
        """Update `bound`."""
        # not `kthvalue`: on CUDA it is refused where torch is set to deterministic algorithms
        self.bound = self.height.sort(dim=1).values[:, self.num_merges - 1].contiguous()

    def lowest_merges(self, rank: Tensor) -> Tensor:
        """Tokens whose merges are the N - K lowest, `[B, N] -> [B, N - K]` int64.

        Of equal heights the earlier are lower, and in one round those of lower `rank`.
        """
        order = rank.argsort(dim=1, stable=True)
        for key in (self.merged_in, self.height):
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        return order[:, : self.num_merges]


def labels_by_rounds(rounds: FixedRounds) -> Tensor:
    """Go through all rounds, `-> [B, N]` int64."""
    for this_round in count(1):
        rounds.search()
        if this_round % rounds.rounds_between_tests == 0 and not rounds.goes_on():
            break
        rounds.merge(this_round)
    return rounds.labels()


def list_tokens(flags: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens flagged in each image, ascending, then the others; `[B, N] -> [B, N], [B, 1]`."""
    order = (~flags).to(torch.uint8).argsort(dim=1, stable=True)
    return order, flags.sum(1, keepdim=True)


def row_blocks(rows: int, numbers_per_row: int) -> Iterator[slice]:
    """Consecutive blocks of rows whose temporary arrays stay small."""
    step = max(1, _BLOCK_NUMBERS // numbers_per_row)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def take(values: Tensor, places: Tensor) -> Tensor:
    """Rows of each image, `[B, N, C], [B, M] -> [B, M, C]`."""
    return values.gather(1, places.unsqueeze(2).expand(-1, -1, values.shape[2]))


def follow(parent: Tensor) -> Tensor:
    """The root of every token of a forest, `[B, N] -> [B, N]`; a root is its own parent."""
    for _ in range(ceil(log2(parent.shape[1]))):
        parent = parent.gather(1, parent)
    return parent


def number_by_first(root: Tensor) -> Tensor:
    """Labels in the order of first tokens; each root is its cluster's lowest token, `[B, N]`."""
    is_first = root == torch.arange(root.shape[1], device=root.device)
    return (is_first.cumsum(1) - 1).gather(1, root)
