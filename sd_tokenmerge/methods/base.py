"""What a merging method is: tokens in, `Partition` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import fields
from typing import ClassVar, NamedTuple

from torch import Tensor

from sd_tokenmerge.partitions import Partition


class Grid(NamedTuple):
    """Height and width of an image in tokens; token `i` is at row `i // width`, column `i % width`."""

    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        """N = height * width."""
        return self.height * self.width


class Method(ABC):
    """A hard merging method; subclasses are frozen dataclasses whose fields are its options.

    A method is a pure function of its arguments. It must not depend on the other images of the batch,
    and draws random numbers only from `seed`: the same draw for every image, so that batch size and
    order never change a result.
    """

    name: ClassVar[str]
    uses_seed: bool = False
    """Whether the result depends on `seed`."""
    uses_scores: bool = False
    """Whether `scores` (significance of each token) must be given."""

    @abstractmethod
    def __call__(
        self,
        tokens: Tensor,
        num_clusters: int,
        *,
        grid: Grid,
        seed: int = 0,
        scores: Tensor | None = None,
    ) -> Partition:
        """Cluster each image's tokens.

        Args:
            tokens: `[B, N, C]`, any float dtype.
            num_clusters: K, in [1, N].
            grid: layout of the N tokens; `grid.num_tokens == N`.
            seed: what a random method draws from.
            scores: `[B, N]` non-negative significance of each token, where `uses_scores`.

        Returns:
            A partition with exactly K non-empty clusters.

        Raises:
            ValueError: K is out of the method's reach, or `scores` are missing.
        """

    def smallest_num_clusters(self, grid: Grid) -> int:
        """The smallest K that this method can reach on `grid`."""
        return 1

    def __str__(self) -> str:
        """The method string that `parse_method` reads back, options at their default left out."""
        options = [
            f"{field.name}={_spell(getattr(self, field.name))}"
            for field in fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) != field.default
        ]
        return self.name + (":" + ",".join(options) if options else "")

    def require_reachable(self, num_clusters: int, grid: Grid) -> None:
        """Refuse a K that this method cannot reach on `grid`.

        Raises:
            ValueError: K is outside [`smallest_num_clusters`, N].
        """
        low, high = self.smallest_num_clusters(grid), grid.num_tokens
        if not low <= num_clusters <= high:
            raise ValueError(
                f"`num_clusters` must be in [{low}, {high}] for {self} on a "
                f"{grid.height}x{grid.width} grid (a keep rate of at least {low / high:.4g}), "
                f"got {num_clusters}."
            )


def _spell(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
